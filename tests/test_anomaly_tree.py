"""The organizers' folders: what is read, in which order, and how each fault is named without stopping the rest."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.anomaly_tree import check_category, image_truth, pixel_truth, read_mask, read_tree
from data.errors import InputError


def image(path, size=(12, 8), value=80):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """One category: 2 good images, 2 scratched with masks."""
    for name in ("b", "a"):
        image(tmp_path / "pill/test/good" / f"{name}.png")
        image(tmp_path / "pill/test/scratch" / f"{name}.png")
        image(tmp_path / "pill/ground_truth/scratch" / f"{name}_mask.png", value=255)
    return tmp_path


def only(root):
    tree = read_tree(root)
    assert tree.problems == ()
    return tree.categories[0]


def test_images_come_by_kind_and_name_with_their_masks(root):
    image(root / "pill/test/bent/z.png")
    image(root / "pill/ground_truth/bent/z.png")
    category = only(root)
    assert category.name == "pill" and category.has_masks
    assert [(i.kind, i.path.name, i.mask and i.mask.name) for i in category.images] == [
        ("bent", "z.png", "z.png"), ("good", "a.png", None), ("good", "b.png", None),
        ("scratch", "a.png", "a_mask.png"), ("scratch", "b.png", "b_mask.png")]
    assert image_truth(category).tolist() == [True, False, False, True, True]


def test_masks_of_other_names_follow_sorted_order(root):
    for old, new in (("a_mask", "1"), ("b_mask", "2")):
        (root / f"pill/ground_truth/scratch/{old}.png").rename(root / f"pill/ground_truth/scratch/{new}.png")
    assert [i.mask.name for i in only(root).images if i.mask] == ["1.png", "2.png"]


def test_names_win_over_order(root):
    """Sorted, '10_mask' would belong to '2' and the reverse."""
    for name, value in (("2", 0), ("10", 255)):
        image(root / f"pill/test/hole/{name}.png")
        image(root / f"pill/ground_truth/hole/{name}_mask.png", value=value)
    pairs = {i.path.name: i.mask.name for i in only(root).images if i.kind == "hole"}
    assert pairs == {"10.png": "10_mask.png", "2.png": "2_mask.png"}


def test_a_category_without_masks_has_image_labels_only(root, refuses):
    image(root / "cell/test/good/a.png")
    image(root / "cell/test/defective/a.png")
    cell = read_tree(root).categories[0]
    assert cell.name == "cell" and not cell.has_masks and image_truth(cell).tolist() == [True, False]
    with refuses("^cell: expected a folder 'ground_truth', found none$"):
        pixel_truth(cell)


def test_files_that_are_no_images_or_hidden_are_left_out(root):
    (root / "pill/test/good/notes.txt").write_text("x")
    (root / "pill/test/good/.a.png").write_text("x")
    (root / "pill/test/.hidden").mkdir()
    (root / "readme.txt").write_text("x")
    assert len(only(root).images) == 4


def messages(root):
    return [str(p).replace(str(root), "R") for p in read_tree(root).problems]


def test_an_image_without_mask_and_a_mask_without_image_are_named(root):
    image(root / "pill/test/scratch/c.png")
    image(root / "pill/ground_truth/scratch/d.png")
    assert messages(root) == [
        "R/pill/test/scratch/c.png: expected a mask 'c' or 'c_mask' in R/pill/ground_truth/scratch, found none",
        "R/pill/ground_truth/scratch/d.png: expected an image of the same name, found none"]
    assert len(read_tree(root).categories[0].images) == 4


def test_masks_for_good_images_are_refused(root):
    image(root / "pill/ground_truth/good/a.png")
    assert messages(root) == ["R/pill/ground_truth/good: expected no masks for good images, found 1"]


def test_masks_of_a_kind_without_images_are_named(root):
    image(root / "pill/ground_truth/dent/a.png")
    assert messages(root) == ["R/pill/ground_truth/dent: expected images in R/pill/test/dent, found no such folder"]


def test_two_images_of_one_stem_are_named_and_left_out(root):
    image(root / "pill/test/good/a.bmp")
    assert messages(root) == ["R/pill/test/good: expected different stems, found a.bmp, a.png"]
    assert [i.path.name for i in read_tree(root).categories[0].images if i.kind == "good"] == ["b.png"]


def test_empty_folders_are_named_and_stop_nothing_else(root):
    (root / "pill/test/empty").mkdir()
    (root / "a_void").mkdir()
    (root / "b_void/test").mkdir(parents=True)
    assert messages(root) == [
        "R/a_void: expected a folder 'test', found none",
        "R/b_void/test: expected a folder for each kind ('good' or a defect), found none",
        "R/pill/test/empty: expected images, found none"]
    assert [c.name for c in read_tree(root).categories] == ["pill"]


def test_an_unusable_root_is_raised(tmp_path, refuses):
    with refuses("expected a folder of categories, found no such folder$"):
        read_tree(tmp_path / "none")
    with refuses("expected a folder of categories, found no folder in it$"):
        read_tree(tmp_path)
    with refuses("a.png: expected a folder of categories, found a file$"):
        read_tree(image(tmp_path / "a.png"))


def test_opening_finds_wrong_sizes_and_broken_files(root):
    image(root / "pill/ground_truth/scratch/a_mask.png", size=(8, 12))
    (root / "pill/test/good/a.png").write_bytes(b"no image")
    left, problems = check_category(only(root))
    assert [(i.kind, i.path.name) for i in left.images] == [("good", "b.png"), ("scratch", "b.png")]
    assert "good/a.png: expected a readable image, found cannot identify" in str(problems[0])
    assert str(problems[1]).endswith("scratch/a_mask.png: expected 12x8, the size of a.png, found 8x12")
    assert all(isinstance(p, InputError) for p in problems) and len(problems) == 2


def test_a_mask_belongs_to_the_pixels_as_stored(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera's note to turn it; the organizers read the stored pixels, and so do the masks
    Image.new("L", (12, 8)).save(root / "pill/test/scratch/a.png", exif=exif)
    assert check_category(only(root))[1] == ()
    Image.new("L", (8, 12)).save(root / "pill/test/scratch/a.png", exif=exif)
    assert "expected 8x12, the size of a.png, found 12x8" in str(check_category(only(root))[1][0])


def test_nothing_left_is_none(root):
    for path in (root / "pill/test").rglob("*.png"):
        path.write_bytes(b"")
    left, problems = check_category(only(root))
    assert left is None and len(problems) == 4


def test_masks_follow_the_organizers_transform(tmp_path):
    levels = np.zeros((300, 500), np.uint8)
    levels[40:43, 100:220] = 255
    levels[200, 400] = 90
    Image.fromarray(levels).save(tmp_path / "m.png")
    theirs = transforms.Compose([transforms.Resize((224, 224)), transforms.CenterCrop(224), transforms.ToTensor()])
    expected = theirs(Image.open(tmp_path / "m.png").convert("L")) > 0
    found = read_mask(tmp_path / "m.png")
    assert found.dtype == torch.bool and found.shape == (1, 224, 224) and found.any()
    assert torch.equal(found, expected)


def test_pixel_truth_is_zero_for_good_images(root):
    truth = pixel_truth(only(root))
    assert truth.shape == (4, 1, 224, 224)
    assert truth.flatten(1).all(1).tolist() == [False, False, True, True] and not truth[:2].any()
