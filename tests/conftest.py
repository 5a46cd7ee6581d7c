def pytest_addoption(parser):
    parser.addoption("--impl", default="torch", help="implementation that tests/kernels run")
    parser.addoption("--device", default="cpu", help="device that tests/kernels run on")
