"""What the tasks are given: images, sets, zoos; readers, validators and builders."""
