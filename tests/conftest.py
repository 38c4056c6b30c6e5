import pytest
import torch
from devices import DEVICE, place_tests, register_second_device

torch.set_num_threads(1)  # the nets of the tests are small: threads only wait for each other

# What `make versions` runs on other versions of torch, numpy and SciPy: every make, transform and consume, in small.
CORE = {
    "activation", "bits", "block_spectra", "compose", "eigen", "follow", "functional", "gauss_newton_datasets",
    "hutchinson", "journal", "known_truths", "landscape", "matvec", "models", "op_definitions", "operations", "package",
    "probes", "products", "recorder", "report", "rounding", "scaling", "sensitivity", "solve", "spectrum",
    "trace_graph", "tree", "versions",
}  # fmt: skip
CORE = {f"test_{name}" for name in CORE}

# Of the slow ones, those that measure memory or time: nothing may run beside them.
ALONE = {
    f"test_{name}" for name in ("language_peaks", "marked_outputs", "part_check", "real_net", "report_errors", "start")
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)
        if item.path.stem in CORE and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.core)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--placed", action="store_true", help="tests put their tensors on the device HESSFN_TEST_DEVICE")


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE == "second":
        register_second_device()
        config.addinivalue_line("filterwarnings", "ignore:An output with one or more elements was resized")  # mse_loss
    if config.getoption("--placed"):
        place_tests()
