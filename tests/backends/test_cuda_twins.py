"""kernels.cu without a GPU: every kernel runs on the CPU, thread by thread, and compiles for one.

The source is compiled as C++ with the few words of CUDA that it uses defined by hand: a block is a
set of threads, __syncthreads a barrier, a shuffle an exchange between two barriers. What is left
to a GPU is its speed. Under CUDA the same tests run on the device itself.
"""
import ctypes
import importlib.util
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

import kernels
from config import UserError

ROOT = Path(kernels.__file__).parent
CUDA_WORDS = r"""
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#define __device__
#define __global__
#define __shared__ static            // blocks run one after the other
struct Index { unsigned x; };
thread_local Index threadIdx;
static Index blockIdx, blockDim, gridDim;
static std::unique_ptr<std::barrier<>> wall;
static float slots[1024];
static inline void __syncthreads() { wall->arrive_and_wait(); }
static inline float __shfl_xor_sync(unsigned, float x, int step) {
    slots[threadIdx.x] = x;
    wall->arrive_and_wait();
    float y = slots[(threadIdx.x & ~31u) | ((threadIdx.x & 31u) ^ step)];
    wall->arrive_and_wait();
    return y;
}
static inline float __int_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_int(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
extern "C" void block(unsigned grid, unsigned threads, unsigned index) {
    gridDim.x = grid; blockDim.x = threads; blockIdx.x = index;
    wall = std::make_unique<std::barrier<>>(threads);
}
extern "C" void thread(unsigned index) { threadIdx.x = index; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """kernels.cu as a shared library for this CPU."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "k.cpp").write_text(CUDA_WORDS + (ROOT / "backends" / "cuda.cu").read_text())
    done = subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o",
                           folder / "k.so", folder / "k.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "k.so"))


@pytest.fixture
def twins(library, monkeypatch):
    """cuda_twins with its launches going to the GPU, or where there is none to the library."""
    from backends import cuda
    if torch.cuda.is_available():
        return cuda

    def kernel(name):
        function = getattr(library, name)
        function.restype = None

        def run(grid, block, args):
            assert block[0] % 32 == 0 and grid[1:] == block[1:] == (1, 1)
            kinds = {int: ctypes.c_int, float: ctypes.c_double}
            values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor)
                      else kinds[type(a)](a) for a in args]
            assert all(a.is_contiguous() for a in args if isinstance(a, torch.Tensor))

            def work(index):
                library.thread(index)
                function(*values)
            for b in range(grid[0]):
                library.block(grid[0], block[0], b)
                threads = [threading.Thread(target=work, args=(t,)) for t in range(block[0])]
                [t.start() for t in threads]
                [t.join() for t in threads]
        return run

    monkeypatch.setattr(cuda, "compiled", kernel)
    monkeypatch.setattr(cuda, "usable", lambda x: True)
    monkeypatch.setattr(cuda, "THREADS", 64)
    monkeypatch.setattr(cuda, "ROWS", 3)          # fewer than rows: each walks several
    return cuda


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name, the operation's twin, how many inputs share the shape, further arguments
OPERATIONS = {
    "gelu": (kernels.gelu, 1, {}), "swiglu": (kernels.glu, 2, {}),
    "rms_norm": (kernels.rms_norm, 1, dict(eps=1e-5)),
    "rms_norm 1 + w": (kernels.rms_norm, 1, dict(eps=1e-6, offset=1.0)),
    "softmax": (kernels.softmax, 1, {}),
}


def distance(a, b):
    return ((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype, gate", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 123), (7, 1), (1, 200), (5, 31)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_twin_is_its_formula_in_float64(twins, name, shape, dtype, gate):
    """Forward and every gradient; rows narrower and wider than a block, several rows a block."""
    operation, count, options = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=dtype) * 2 for _ in range(count)]
    if "norm" in name:
        inputs.append(torch.randn(shape[-1]))
    upstream = torch.randn(shape, dtype=dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = operation.reference(*exact, **options)
    expected.backward(upstream.double())
    given = [x.to(DEVICE).requires_grad_() for x in inputs]
    y = operation.implementations["cuda"](*given, **options)
    y.backward(upstream.to(DEVICE))
    assert y.dtype == dtype and distance(y, expected.detach()) < gate
    for x, e in zip(given, exact):
        if shape[-1] == 1 and x is given[0] and ("norm" in name or name == "softmax"):
            # a row of one is constant, or nearly: what is left of its gradient is rounding
            assert (x.grad.double().cpu() - e.grad).abs().max() < gate
        else:
            assert x.grad.dtype == x.dtype and distance(x.grad, e.grad) < gate


def test_strided_inputs_and_an_empty_batch(twins):
    x = torch.randn(6, 40, device=DEVICE).T[::2]  # (20, 6), not contiguous
    assert (
        distance(kernels.softmax.implementations["cuda"](x), torch.softmax(x.double().cpu(), -1))
        < 1e-6
    )
    for name, (operation, count, options) in OPERATIONS.items():
        empty = [torch.zeros(0, 8, device=DEVICE, requires_grad=True) for _ in range(count)]
        weight = [torch.ones(8, device=DEVICE, requires_grad=True)] if "norm" in name else []
        y = operation.implementations["cuda"](*empty, *weight, **options)
        y.sum().backward()
        assert y.shape == (0, 8) and all(w.grad.abs().max() == 0 for w in weight)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(twins):
    values = torch.tensor([1.00390625, 1.01171875, 3.3e38, float("inf"), 0.0, -1.00390625])
    got = kernels.glu.implementations["cuda"](torch.full((6,), 30.0, device=DEVICE).bfloat16(),
                                    (values / 30).bfloat16().to(DEVICE))
    exact = 30 * (values / 30).bfloat16().double()
    assert torch.equal(got.cpu()[:2], exact[:2].bfloat16()) and got[3].isinf() and got[4] == 0
    nan = torch.tensor([float("nan")], device=DEVICE).bfloat16()
    assert kernels.gelu.implementations["cuda"](nan).isnan().all()


def test_what_has_no_twin_takes_another_form(twins):
    x = torch.randn(3, 8, device=DEVICE)
    for activation in ("gelu", "relu2"):
        close = kernels.glu.reference(x, x, activation)
        torch.testing.assert_close(kernels.glu.implementations["cuda"](x, x, activation), close)
    torch.testing.assert_close(kernels.gelu.implementations["cuda"](x, approximate="tanh"),
                               kernels.gelu.reference(x, approximate="tanh"))


def test_a_type_or_a_device_without_a_kernel_is_one_sentence(twins, monkeypatch):
    with pytest.raises(UserError, match="float32 and bfloat16, not torch.float64"):
        kernels.softmax.implementations["cuda"](torch.randn(2, 3, device=DEVICE).double())
    monkeypatch.undo()
    with pytest.raises(UserError, match="needs a GPU"):
        kernels.softmax.implementations["cuda"](torch.randn(2, 3))


def nvrtc():
    """NVIDIA's run-time compiler from its PyPI package or a CUDA build of torch, or None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in Path(folder).glob("**/libnvrtc.so.*"):
            if "builtins" not in path.name:
                return ctypes.CDLL(str(path))
    return None


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_kernel_compiles_for_a_gpu(architecture, tmp_path):
    """By NVRTC, as cuda_twins does it, without a header, to machine code without spills."""
    library = nvrtc()
    if library is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    source, program = (ROOT / "backends" / "cuda.cu").read_bytes(), ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"cuda.cu", 0, None,
                                      None) == 0
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    status, size = library.nvrtcCompileProgram(program, 1, options), ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert library.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    names = {f"{op}_{way}_{kind}" for op in ("gelu", "swiglu", "rms_norm", "softmax")
             for way in ("forward", "backward") for kind in ("float32", "bfloat16")}
    assert all(name.encode() in cubin.raw for name in names)
    (tmp_path / "k.cubin").write_bytes(cubin.raw)
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        usage = subprocess.run([tool, "--dump-resource-usage", tmp_path / "k.cubin"],
                               capture_output=True, text=True).stdout
        stacks = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
        assert len(stacks) == len(names) and {s for _, s in stacks} == {"0"}, usage
