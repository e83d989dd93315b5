"""The one door to Triton: a `@triton.jit` kernel as a JAX operation, on CUDA and ROCm, or compiled offline.

A launch is a JAX primitive of our own, so it can be traced anywhere, without a GPU. For one that is there, or
assumed, Triton begins to compile it at once, on another thread. What becomes of it is decided in lowering:

- engine "ffi" (default): jaxlib's call of a Triton kernel, in the form that can enter a CUDA graph; 1.1 us.
- engine "xla": XLA's own Triton call, which takes the kernel's TTIR. 0.7 us, but it parses the dialect of a
  nearby Triton version only, and may go away.
- `compile_offline`: Triton's own compilers for NVIDIA and AMD, for tests and inspection.

A kernel parameter named VENDOR is filled with "cuda" or "rocm" by whichever of these lowers it. Pointers are
promised to be 16-byte aligned, as XLA's buffers are. Arguments come in the order inputs, outputs, constants;
an output that lies where an input lies (`aliases`) is an argument too.
"""

import dataclasses
import functools
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import mlir

from pallas_kernels.target import current_target

Engine = Literal["ffi", "xla"]

# Triton's names of the element types it is handed; FP4 and E8M0 travel as uint8.
_TYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e4m3fnuz": "fp8e4b8",
    "int8": "i8",
    "int32": "i32",
    "uint8": "u8",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch, known from its shapes alone.

    Attributes:
      kernel: the `@triton.jit` function.
      dtypes: of inputs and outputs, in the kernel's order.
      constants: values of its `tl.constexpr` parameters.
      num_warps, num_stages: as Triton means them.
    """

    kernel: Any
    dtypes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int


_launch = Primitive("triton_launch")
_launch.multiple_results = True
_launch.def_impl(lambda *args, **params: jax.jit(functools.partial(_launch.bind, **params))(*args))
_launch.def_abstract_eval(lambda *_, out, **__: [jax.core.ShapedArray(o.shape, o.dtype) for o in out])


def triton_call(
    kernel: Any,
    *inputs: jax.Array,
    out: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: Mapping[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    engine: Engine = "ffi",
    **constants: Any,
) -> Any:
    """Launches `kernel(*inputs, *out, **constants)` on `grid`, inside or outside of `jax.jit`.

    Args:
      aliases: by number of an input, the number of the output that takes its place in memory, and so begins
        as what the input is. XLA copies the input first wherever it is needed after the launch.

    Returns:
      The outputs, one array or a tuple like `out`. They are not initialised, but for those in `aliases`: the
      kernel writes all of each.

    Raises:
      TypeError: an argument has a dtype that kernels do not take.
    """
    one = isinstance(out, jax.ShapeDtypeStruct)
    outs = (out,) if isinstance(out, jax.ShapeDtypeStruct) else tuple(out)
    for array in (*inputs, *outs):
        if jnp.dtype(array.dtype).name not in _TYPES:
            raise TypeError(f"{kernel.__name__}: no Triton type for {array.dtype}, have {', '.join(_TYPES)}")
    params = {
        "kernel": kernel,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "constants": tuple(sorted(constants.items())),
    }
    if engine == "ffi" and (arch := current_target().arch):
        _compiling(_launch_of(params, (*inputs, *outs)), arch)
    replaced = tuple((aliases or {}).items())
    results = _launch.bind(*inputs, out=outs, grid=grid, aliases=replaced, engine=engine, **params)
    return results[0] if one else tuple(results)


def launches(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Launch]:
    """Every launch that `function` makes on arguments of these shapes, without running anything."""
    jaxpr = jax.make_jaxpr(functools.partial(function, **keywords))(*arguments)
    found = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive is _launch]
    return [_launch_of(eqn.params, [var.aval for var in (*eqn.invars, *eqn.outvars)]) for eqn in found]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _launch_of(params: Mapping[str, Any], arrays: Sequence[Any]) -> Launch:
    dtypes = tuple(jnp.dtype(array.dtype).name for array in arrays)
    return Launch(params["kernel"], dtypes, params["constants"], params["num_warps"], params["num_stages"])


# --- lowering


def _lower(vendor: str, ctx: Any, *args: Any, engine: Engine, **params: Any) -> Any:
    launch = _launch_of(params, (*ctx.avals_in, *ctx.avals_out))
    lower = _lower_by_xla if engine == "xla" else _lower_by_jaxlib
    return lower(vendor, launch, params["grid"], dict(params["aliases"]), ctx, *args)


def _lower_by_jaxlib(vendor: str, launch: Launch, grid: Any, aliases: Any, ctx: Any, *args: Any) -> Any:
    from jaxlib import gpu_triton  # whole on GPU hosts only

    arch = current_target().arch
    binary, capability = _compiling(launch, arch).result(), int(arch[3:]) if vendor == "cuda" else 0
    code = binary.assembly if vendor == "cuda" else binary.path
    no_ttir = ""  # would serve debugging alone
    kernel = gpu_triton.TritonKernel(
        binary.name, launch.num_warps, 1, binary.shared_bytes, code, no_ttir, capability
    )
    aligned = [gpu_triton.create_array_parameter(0, 16) for _ in launch.dtypes]
    call = gpu_triton.TritonKernelCall(kernel, *(*grid, 1, 1)[:3], aligned)
    rule = jax.ffi.ffi_lowering("triton_kernel_call_ffi", api_version=4, operand_output_aliases=aliases)
    return rule(ctx, *args, opaque=zlib.compress(call.to_proto(binary.name, b"")))


def _lower_by_xla(vendor: str, launch: Launch, grid: Any, aliases: Any, ctx: Any, *args: Any) -> Any:
    # TTIR says nothing of the chip: XLA compiles it for the one at hand.
    name, ttir = _ttir(launch, "sm_90" if vendor == "cuda" else "gfx942")
    places = dict(zip(("grid_x", "grid_y", "grid_z"), map(np.int32, (*grid, 1, 1)), strict=False))
    warps, stages = np.int32(launch.num_warps), np.int32(launch.num_stages)
    rule = jax.ffi.ffi_lowering("__gpu$xla.gpu.triton", api_version=4, operand_output_aliases=aliases)
    return rule(ctx, *args, name=name, ir=ttir, num_warps=warps, num_stages=stages, debug=False, **places)


mlir.register_lowering(_launch, functools.partial(_lower, "cuda"), platform="cuda")
mlir.register_lowering(_launch, functools.partial(_lower, "rocm"), platform="rocm")


# --- Triton's own compilers


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
      name: of its function.
      code: an ELF file.
      path: where that file is.
      assembly: PTX or AMD assembly as text.
      shared_bytes: of shared memory that a launch needs.
    """

    name: str
    code: bytes
    path: str
    assembly: str
    shared_bytes: int


_begun: dict[tuple[Launch, str], Future[Binary]] = {}
_beginning = threading.Lock()
_threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="triton")


def _compiling(launch: Launch, arch: str) -> Future[Binary]:
    """A kernel that is being compiled, or was: once in a process, from when it is first traced on.

    Triton's compiler leaves Python to other threads for most of its time, so a program's kernels are compiled
    side by side, and while the program is traced.
    """
    with _beginning:
        if (launch, arch) not in _begun:
            _begun[launch, arch] = _threads.submit(compile_offline, launch, arch)
        return _begun[launch, arch]


def compile_offline(launch: Launch, arch: str) -> Binary:
    """Compiles a launch for "sm_90", "gfx942" and the like; no GPU and no toolkit is needed.

    Triton keeps what it has compiled in $TRITON_CACHE_DIR, and finds it there in the next process.

    Raises:
      Exception: whatever Triton's compiler raises where the kernel cannot be compiled for `arch`.
    """
    import triton

    source, target, options = _source(launch, arch)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    code, assembly = ("cubin", "ptx") if target.backend == "cuda" else ("hsaco", "amdgcn")
    path = next(str(path) for name, path in compiled.metadata_group.items() if name.endswith(code))
    asm, metadata = compiled.asm, compiled.metadata
    return Binary(metadata.name, asm[code], path, asm[assembly], metadata.shared)


def _source(launch: Launch, arch: str) -> tuple[Any, Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    constants, names = dict(launch.constants), launch.kernel.arg_names
    if "VENDOR" in names:
        constants["VENDOR"] = "cuda" if cuda else "rocm"
    pointers = iter(f"*{_TYPES[dtype]}" for dtype in launch.dtypes)
    signature = {name: "constexpr" if name in constants else next(pointers) for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants
    }
    options = make_backend(target).parse_options(
        {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return source, target, options


def _ttir(launch: Launch, arch: str) -> tuple[str, str]:
    """The kernel's name in, and the text of, its module in Triton's first dialect."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    source, target, options = _source(launch, arch)
    backend: Any = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, codegen, backend.get_module_map(), context)
    text = str(module)
    return text.split("tt.func public @", 1)[1].split("(", 1)[0], text
