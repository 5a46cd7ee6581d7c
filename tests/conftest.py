def pytest_addoption(parser):
    parser.addoption("--impl", help="implementation that tests/kernels (default torch) and tests/gpu (triton) run")
    parser.addoption("--device", default="cpu", help="device that tests/kernels run on")
    parser.addoption("--library", help="library to run as the extension, whatever device it was written for")
