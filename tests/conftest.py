"""Shared by all tests: one thread, one way to expect an error."""
import pytest
import torch

from data.errors import InputError


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Test tensors are tiny: threads would mostly wait for each other, and sums would depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def refuses():
    """`with refuses(r"pattern"):` - the block ends in an InputError whose message matches."""
    return lambda pattern: pytest.raises(InputError, match=pattern)
