"""Compiling, finding and loading the extension, on a source tree of two lines wherever the real one is not needed."""

import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from r2m_kernels import __version__, attention_pool, available_implementations, build, dispatch, extension

ROOT = Path(__file__).parent.parent
ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'
CUDA_ANSWER = '__global__ void kernel(int* p) { *p = 42; }\nextern "C" void answer(int* p) { kernel<<<1, 1>>>(p); }\n'
OP = """\
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY(R2M_NAMESPACE, library) { library.def("answer() -> int"); }
"""


@pytest.fixture(autouse=True)
def csrc(tmp_path, monkeypatch):
    """Sources, and nothing built: what this machine has built, this process loaded or its user wants is not seen."""
    for name in ("CXX", "CUDA_HOME", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "R2M_KERNELS_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "AHEAD_OF_TIME", tmp_path / "lib")
    monkeypatch.setattr(extension, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(extension, "ops", functools.cache(extension.ops.__wrapped__))
    monkeypatch.setattr(extension, "_loaded", set())
    extension.reason.cache_clear()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "cpu" / "answer.cpp").write_text(ANSWER % 42)
    (tmp_path / "csrc" / "cuda" / "answer.cu").write_text(CUDA_ANSWER)
    yield tmp_path / "csrc"
    extension.reason.cache_clear()


@pytest.fixture
def tools():
    """Skips where nothing can be compiled."""
    try:
        build.find_cxx()
        build.find_ninja()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def nvcc(tools):
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiler(tools, tmp_path, monkeypatch):
    """Makes CXX a script, which does `first` before it compiles, and calls itself `name`."""
    real = build.find_cxx()

    def make(first: str = ":", name: str = "a compiler") -> Path:
        script = tmp_path / "c++"
        compiles = f'case "$*" in --version) echo {name}; exit;; *" -c "*) {first};; esac'
        script.write_text(f'#!/bin/sh\n{compiles}\nexec {real} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        build._version.cache_clear()
        return script

    yield make
    build._version.cache_clear()


def libraries():
    return sorted(path.name for path in extension.cache().rglob("*.so*"))


def start(csrc):
    """`build(["cpu"])` of these sources, in a process of its own."""
    code = f"from r2m_kernels import build; build.build(['cpu'], csrc=build.Path({str(csrc)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


# What is found


def test_nothing_is_built():
    assert extension.reason("cpu") == extension.reason("cuda") == "not built (python -m r2m_kernels.build builds it)"
    assert extension.reason("mps") == "has no code for 'mps'"
    with pytest.raises(RuntimeError, match="'cpu': not built"):
        extension.ops("cpu")
    with pytest.raises(RuntimeError, match="no code for 'mps'"):
        extension.ops("mps")


def test_what_is_built_is_found_and_not_built_again(tools, capfd):
    path = build.build(["cpu"])["cpu"]
    assert extension.reason("cpu") is None and extension.find("cpu") == path
    assert ctypes.CDLL(str(path)).answer() == 42
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", path.name]
    assert re.search(rf"cpu: built in \d+ s, {path}", capfd.readouterr().out)
    inode = path.stat().st_ino
    assert build.main(["cpu"]) == 0
    assert capfd.readouterr().out == f"cpu: already built, {path}\n" and path.stat().st_ino == inode


@pytest.mark.slow
def test_ops_loads_the_library(tools, csrc):
    (csrc / "registration.cpp").write_text(OP)
    build.build(["cpu"])
    code = f"from r2m_kernels import extension as e; e.CSRC = e.Path({str(csrc)!r}); print(e.ops('cpu').answer.default)"
    assert (
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "r2m_kernels_cpu.answer.default\n"
    )


def test_a_library_of_other_sources_is_not_taken(tools, csrc):
    first = build.build(["cpu"])["cpu"]
    (csrc / "cpu" / "answer.cpp").write_text(ANSWER % 43)
    extension.reason.cache_clear()
    assert "not built" in extension.reason("cpu")
    second = build.build(["cpu"])["cpu"]
    assert ctypes.CDLL(str(second)).answer() == 43 and second != first
    (csrc / "cpu" / "answer.cpp").write_text(ANSWER % 42)
    assert extension.find("cpu") == first
    (csrc / "new.h").write_text("")
    assert extension.find("cpu") is None
    (csrc / "new.h").unlink()
    (csrc / "cuda" / "new.cuh").write_text("")
    assert extension.find("cpu") == first


def test_an_ahead_of_time_library_of_other_sources_is_not_taken(tools, csrc):
    path = build.build(["cpu"], folder=extension.AHEAD_OF_TIME)["cpu"]
    assert path.parent == extension.AHEAD_OF_TIME and extension.reason("cpu") is None
    (csrc / "cpu" / "answer.cpp").write_text(ANSWER % 43)
    extension.reason.cache_clear()
    assert extension.reason("cpu") is None  # what is loaded stays
    extension._loaded.clear()
    extension.reason.cache_clear()
    assert extension.reason("cpu").startswith(f"{path} was built from other sources")
    with pytest.raises(RuntimeError, match="other sources"):
        extension.ops("cpu")


def test_other_flags_than_those_of_build_are_not_taken(tools, monkeypatch):
    build.build(["cpu"])
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b" " * (path.name == "build.py"))
    assert extension.find("cpu") is None


def test_of_several_compilers_libraries_the_last_one_asked_for_is_taken(compiler, monkeypatch):
    compiler(name="version 1")
    first = build.build(["cpu"])["cpu"]
    compiler(name="version 2")
    second = build.build(["cpu"])["cpu"]
    assert first != second and extension.find("cpu") == second
    compiler(name="version 1")
    assert build.build(["cpu"])["cpu"] == first == extension.find("cpu")
    monkeypatch.setenv("CXX", "/nowhere/c++")  # without a compiler, what there is stays good
    assert extension.reason("cpu") is None


def test_extra_flags_make_a_library_apart(tools):
    path = build.build(["cpu"], extra_flags=["-O1", "-g"])["cpu"]
    assert path.exists() and extension.find("cpu") is None
    assert build.build(["cpu"], extra_flags=["-O2"])["cpu"] != path
    assert build.build(["cpu"])["cpu"] != path


def put(content):
    """A file where the library is looked for."""
    extension.cache().mkdir(parents=True, exist_ok=True)
    path = extension.cache() / f"cpu-{extension.sources_key('cpu')}-0.so"
    path.write_bytes(content)
    return path


def test_a_file_that_is_no_library_is_an_error_with_the_loaders_message():
    path = put(b"no library")
    with pytest.raises(RuntimeError, match=rf"cannot load {path}: .*(too short|ELF)"):
        extension.ops("cpu")


def test_what_cannot_be_loaded_leaves_auto_the_others_and_is_not_tried_again(monkeypatch):
    path, query, hidden = put(b"no library"), torch.randn(2, 4), torch.randn(2, 3, 4)
    assert dispatch.choose("auto", hidden) == "torch"
    assert torch.equal(attention_pool(query, hidden), attention_pool(query, hidden, impl="torch"))
    reason = available_implementations()["extension"] if not torch.cuda.is_available() else extension.reason("cpu")
    assert reason.startswith(f"cannot load {path}: ")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("tried again"))
    with pytest.raises(RuntimeError, match=f"impl='extension' cannot run: cannot load {path}"):
        attention_pool(query, hidden, impl="extension")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_truncated_library_is_an_error_and_not_the_end_of_the_process(tools, share):
    content = build.build(["cpu"])["cpu"].read_bytes()
    path = put(content[: int(share * len(content))])
    assert extension.reason("cpu") == (
        f"cannot load {path}: the file is truncated (delete it, and python -m r2m_kernels.build builds it anew)"
    )


# What is compiled, and how


def test_simd_files_are_compiled_once_for_each_instruction_set(tools, csrc, monkeypatch):
    (csrc / "cpu" / "sum_simd.cpp").write_text("")
    (csrc / "registration.cpp").write_text("")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    recipe = build.recipe_for("cpu")
    outputs = [step.output for step in recipe.compiling]
    assert sorted(outputs[:3]) == ["cpu/answer.cpp.o", "cpu/sum_simd.cpp.baseline.o", "registration.cpp.o"]
    assert outputs[3:] == ["cpu/sum_simd.cpp.avx2.o", "cpu/sum_simd.cpp.avx512.o"]
    link = recipe.linking[-1].command
    assert [word for word in link if word.endswith(".o") and word != "-o"] == outputs  # inline functions: see build.py
    commands = {step.output: step.command for step in recipe.compiling}
    avx2, avx512 = (commands[f"cpu/sum_simd.cpp.{isa}.o"] for isa in ("avx2", "avx512"))
    assert "-DR2M_ISA=avx2" in avx2 and "-mavx2" in avx2 and "-mavx512f" not in avx2
    assert "-DR2M_ISA=avx512" in avx512 and "-mavx512f" in avx512
    for name in outputs[:3]:
        assert not any(word.startswith("-m") for word in commands[name])
    assert "-DR2M_NAMESPACE=r2m_kernels_cpu" in avx2 and "-DR2M_DEVICE=CPU" in avx2
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert sorted(step.output for step in build.recipe_for("cpu").compiling) == sorted(outputs[:3])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", ["80,code=sm_80"]),
        ("9.0a;12.0+PTX", ["90a,code=sm_90a", "120,code=sm_120", "120,code=compute_120"]),
        ("7.5 8.0  10.0f;", ["80,code=sm_80", "100f,code=sm_100f"]),
        ("", ["80,code=sm_80", "80,code=compute_80", "90a,code=sm_90a", "100,code=sm_100", "120,code=sm_120"]),
    ],
)
def test_architectures(given, expected, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    flags = [flag for name in build.cuda_architectures() for flag in build._gencode(name)]
    assert flags == [f"-gencode=arch=compute_{text}" for text in expected]


@pytest.mark.parametrize("given", ["sm_90", "9", "8.0,Hopper!", "9.0a+ptx", "7.5"])
def test_unknown_architectures(given, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    with pytest.raises(build.BuildError, match=r"TORCH_CUDA_ARCH_LIST: expected .*8\.0\+PTX.* got"):
        build.cuda_architectures()


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs(1000.0) == 3
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(build.BuildError, match="MAX_JOBS: expected a number"):
            build.jobs(1.0)


def test_jobs_fit_into_memory(tmp_path, monkeypatch):
    names = [tmp_path / name for name in ("meminfo", "max", "current")]
    monkeypatch.setattr(build, "MEMORY_FILES", names)
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: range(16))
    names[0].write_text(f"MemTotal: 1 kB\nMemAvailable:   {11 << 20} kB\n")
    assert build.jobs(2.0) == 5 and build.jobs(0.1) == 16 and build.jobs(100.0) == 1
    names[1].write_text("max\n")
    names[2].write_text("7\n")
    assert build.jobs(2.0) == 5
    names[1].write_text(f"{7 << 30}\n")
    assert build.jobs(2.0) == 3


@pytest.mark.slow
def test_a_cuda_library_is_built_whatever_torch_is_here(nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    path = build.build(["cuda"])["cuda"]
    if shutil.which("readelf"):
        dynamic = subprocess.check_output(["readelf", "-d", path], text=True)
        assert {"libtorch_cpu.so", "libc10.so", "libtorch_cuda.so"} <= set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        assert "libcudart" not in dynamic and "RPATH" not in dynamic and "RUNPATH" not in dynamic
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert extension.find("cuda") == path  # whatever the variable says when it is loaded


# What goes wrong


def test_a_failed_compilation_shows_the_compilers_message(tools, csrc, capfd):
    (csrc / "cpu" / "answer.cpp").write_text("int answer() { return not_declared; }\n")
    assert build.main(["cpu"]) == 1
    out, err = capfd.readouterr()
    assert "not_declared" in out and "error: cpu: could not be compiled" in err and libraries() == []


def test_an_op_that_nobody_wrote_is_an_error(tools, csrc, capfd):
    (csrc / "registration.cpp").write_text("void missing();\nauto pointer = &missing;\n")
    assert build.main(["cpu"]) == 1
    assert "missing" in capfd.readouterr().out and libraries() == []


def test_sources_that_change_meanwhile_make_no_library(compiler, csrc):
    compiler(f"echo >> {csrc}/cpu/answer.cpp")
    with pytest.raises(build.BuildError, match="changed while it was compiled"):
        build.build(["cpu"])
    assert libraries() == []


@pytest.mark.slow
def test_two_processes_compile_once(compiler, csrc, tmp_path):
    compiler(f"echo compiling >> {tmp_path}/log; sleep 1")
    processes = [start(csrc), start(csrc)]
    out = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "compiling\n"
    assert sum("already built" in text for text in out) == 1
    assert len(libraries()) == 1


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_is_taken_for_a_library(compiler, csrc, tmp_path):
    compiler(f"touch {tmp_path}/started cpu.so; sleep 60")
    process = start(csrc)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(extension.cache().glob(".building-*/cpu.so")) and extension.find("cpu") is None
    compiler()
    assert build.build(["cpu"])["cpu"] == extension.find("cpu")
    assert not list(extension.cache().glob(".building-*"))


def test_no_cxx(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: looked for c\+\+ and g\+\+ on PATH"):
        build.build(["cpu"])
    monkeypatch.setenv("CXX", "icpc")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: looked for icpc"):
        build.build(["cpu"])


def test_no_ninja(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(build.BuildError, match=rf"no ninja: looked in {tmp_path} and on PATH"):
        build.find_ninja()


@pytest.mark.parametrize("torch_has_cuda", [True, False])
def test_no_nvcc(torch_has_cuda, tools, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_torch_has_cuda", lambda: torch_has_cuda)
    assert build.main(["cuda"]) == 1
    assert f"error: no nvcc: looked for {tmp_path}/bin/nvcc" in capfd.readouterr().err
    assert build.main([]) == 0
    out = capfd.readouterr().out
    assert "cuda: left out" in out and ("no nvcc" in out) == torch_has_cuda and "cpu: built" in out


def test_an_older_torch(tools, monkeypatch):
    path = build.build(["cpu"])["cpu"]
    extension.reason.cache_clear()
    monkeypatch.setattr(build.torch, "__version__", "2.10.0+cpu")
    assert extension.reason("cpu") == "needs torch 2.11 or newer, and this is 2.10.0+cpu" and path.exists()
    with pytest.raises(build.BuildError, match=r"the extension needs torch 2\.11 or newer, and this is 2\.10\.0\+cpu"):
        build.build(["cpu"])


def test_bad_arguments(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"backends: expected .* got 'rocm'"):
        build.build(["rocm"])
    with pytest.raises(SystemExit):
        build.main(["rocm"])
    assert "expected cpu or cuda, got 'rocm'" in capsys.readouterr().err
    with pytest.raises(build.BuildError, match="no sources"):
        build.build(["cpu"], csrc=tmp_path / "nowhere")


# Ahead of time


@pytest.fixture
def project(tmp_path, csrc):
    """A copy of this project with the small sources."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building a wheel needs setuptools 77")
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("r2m", "r2m_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    shutil.copytree(csrc, folder / "csrc")
    return folder


def wheel(project, before="", after=""):
    """What pip does with --no-build-isolation; the wheel's path, or None and the output."""
    code = f"import sys\n{before}\nfrom setuptools import build_meta\nprint(build_meta.build_wheel('.'))\n{after}"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    return (project / done.stdout.split()[-1] if done.returncode == 0 else None), done.stdout + done.stderr


@pytest.mark.slow
def test_wheels(tools, project, tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_KERNELS_BUILD", "cpu")
    path, _ = wheel(project)
    assert re.fullmatch(rf"r2m_kernels-{re.escape(__version__)}-py3-none-linux_\w+\.whl", path.name)
    with zipfile.ZipFile(path) as content:
        content.extractall(tmp_path / "site")
        names = content.namelist()
    assert len([name for name in names if re.fullmatch(r"r2m_kernels/lib/cpu-\w+-\w+\.so", name)]) == 1
    assert not any(".lock" in name for name in names)
    code = "from r2m_kernels import extension as e; print(e.reason('cpu'), e.reason('cuda'), e.find('cpu'))"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path / "site", text=True)
    assert out.startswith("None not built") and str(tmp_path / "site" / "r2m_kernels" / "lib") in out

    shutil.rmtree(tmp_path / "site" / "r2m_kernels" / "lib")  # as an installation without the variable does
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path / "site", text=True)
    assert out.startswith("None not built") and str(extension.cache()) in out

    monkeypatch.delenv("R2M_KERNELS_BUILD")  # in the same folder, where the library still is
    path, _ = wheel(project, after="assert 'torch' not in sys.modules")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as content:
        names = content.namelist()
    assert {"r2m_kernels/csrc/cpu/answer.cpp", "r2m_kernels/csrc/cuda/answer.cu", "r2m_kernels/build.py"} <= set(names)
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_a_checkout_an_sdist_and_the_wheels_of_both_carry_the_same_sources(project, tmp_path):
    shutil.rmtree(project / "csrc")
    shutil.copytree(ROOT / "csrc", project / "csrc")
    code = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    out = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True).stdout
    with tarfile.open(project / out.split()[-1]) as content:
        content.extractall(tmp_path / "sdist", filter="data")
    (from_sdist,) = (tmp_path / "sdist").iterdir()
    packages = [project / "r2m_kernels", from_sdist / "r2m_kernels"]
    for source in (project, from_sdist):
        path, _ = wheel(source)
        packages.append(tmp_path / f"site-{source.name}" / "r2m_kernels")
        with zipfile.ZipFile(path) as content:
            content.extractall(packages[-1].parent)
    code = (
        "from r2m_kernels import extension as e\n"
        "for device in e.DEVICE_TYPES:\n"
        "    print([str(path.relative_to(e.CSRC)) for path in e.sources(device)], e.sources_key(device))"
    )
    found = [
        subprocess.check_output([sys.executable, "-c", code], cwd=package.parent, text=True) for package in packages
    ]
    assert "'ops.h'" in found[0] and "'cuda/grebt.cu'" in found[0]
    assert len(set(found)) == 1


def test_unknown_backends_ahead_of_time(project, monkeypatch):
    monkeypatch.setenv("R2M_KERNELS_BUILD", "rocm")
    path, output = wheel(project)
    assert path is None and "R2M_KERNELS_BUILD: expected 'cpu', 'cuda' (both) or nothing, got 'rocm'" in output


def test_ahead_of_time_without_torch(project, monkeypatch):
    monkeypatch.setenv("R2M_KERNELS_BUILD", "cpu")
    path, output = wheel(project, before="sys.modules['torch'] = None")
    assert path is None and "--no-build-isolation" in output


@pytest.mark.slow
def test_ahead_of_time_where_the_cache_cannot_be_written(tools, project, tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_KERNELS_BUILD", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    path, output = wheel(project)
    assert path is None and f"(XDG_CACHE_HOME names another folder than {extension.cache()})" in output


def test_ahead_of_time_without_a_compiler(project, monkeypatch):
    monkeypatch.setenv("R2M_KERNELS_BUILD", "cpu")
    monkeypatch.setenv("CXX", "icpc")
    path, output = wheel(project)
    assert path is None and "no C++ compiler: looked for icpc" in output
