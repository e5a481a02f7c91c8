"""Shared by all tests: one thread count, no network, no leftovers in the checkout."""
import pytest
import torch

from data.errors import InputError


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Sums are split by thread, so a fixed count keeps float results the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def refuses():
    """`with refuses(r"pattern"):` - the block ends in an InputError whose message matches."""
    return lambda pattern: pytest.raises(InputError, match=pattern)
