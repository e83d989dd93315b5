"""The one door to Triton: a `@triton.jit` kernel as a JAX operation, on CUDA and ROCm, or compiled offline.

A launch is a JAX primitive of our own, so it can be traced anywhere, without a GPU and without jax-triton.
What becomes of it is decided when it is lowered:

- engine "ffi" (default): jax-triton, made to emit its capturable FFI call. jax-triton 0.3 still emits the
  older call, which costs 3.6 us a launch and cannot enter a CUDA graph; the newer one costs 1.1 us.
- engine "xla": XLA's own Triton call, which takes the kernel's TTIR. 0.7 us, but it parses the dialect of a
  nearby Triton version only, and may go away.
- `compile_offline`: Triton's own compilers for NVIDIA and AMD, for tests and inspection.

A kernel parameter named VENDOR is filled with "cuda" or "rocm" by whichever of these lowers it. Pointers are
promised to be 16-byte aligned, as XLA's buffers are. Arguments come in the order inputs, outputs, constants;
an output that lies where an input lies (`aliases`) is an argument too.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import mlir

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
    results = _launch.bind(
        *inputs,
        kernel=kernel,
        out=outs,
        grid=grid,
        aliases=tuple((aliases or {}).items()),
        num_warps=num_warps,
        num_stages=num_stages,
        engine=engine,
        constants=tuple(sorted(constants.items())),
    )
    return results[0] if one else tuple(results)


def launches(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Launch]:
    """Every launch that `function` makes on arguments of these shapes, without running anything."""
    jaxpr = jax.make_jaxpr(functools.partial(function, **keywords))(*arguments)
    return [_as_launch(eqn) for eqn in _equations(jaxpr.jaxpr) if eqn.primitive is _launch]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _as_launch(eqn: Any) -> Launch:
    dtypes = tuple(jnp.dtype(var.aval.dtype).name for var in (*eqn.invars, *eqn.outvars))
    params = eqn.params
    return Launch(params["kernel"], dtypes, params["constants"], params["num_warps"], params["num_stages"])


# --- lowering


def _lower(vendor: str, ctx: Any, *args: Any, engine: Engine, **params: Any) -> Any:
    kernel, constants = params["kernel"], dict(params["constants"])
    if "VENDOR" in kernel.arg_names:
        constants["VENDOR"] = vendor
    lower = _lower_by_xla if engine == "xla" else _lower_by_jax_triton
    return lower(vendor, ctx, *args, **params | {"constants": constants})


def _lower_by_jax_triton(vendor: str, ctx: Any, *args: Any, **params: Any) -> Any:
    call = functools.partial(
        _jax_triton().triton_call,
        kernel=params["kernel"],
        out_shape=params["out"],
        grid=params["grid"],
        input_output_aliases=dict(params["aliases"]),
        num_warps=params["num_warps"],
        num_stages=params["num_stages"],
        **params["constants"],
    )
    return mlir.lower_fun(call, multiple_results=True)(ctx, *args)


@functools.cache
def _jax_triton() -> Any:
    """jax-triton, mended: 0.3 emits the capturable call, and ROCm gets the metadata Triton 3.7 asks for."""
    import jax_triton  # pyright: ignore[reportMissingImports]  (an extra; it imports on GPU hosts only)
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]

    if tuple(int(part) for part in jax_triton.__version__.split(".")[:2]) < (0, 4):
        ffi = types.SimpleNamespace(ffi_lowering=_capturable_lowering)
        triton_lib.jax = types.SimpleNamespace(**{**vars(jax), "ffi": ffi})
    try:
        from triton.backends.amd.compiler import HIPBackend
    except ImportError:
        return jax_triton
    make_llir = HIPBackend.make_llir

    def make_llir_with_metadata(src: Any, metadata: dict[str, Any], options: Any) -> Any:
        metadata.setdefault("num_ctas", options.num_ctas)
        return make_llir(src, metadata, options)

    HIPBackend.make_llir = staticmethod(make_llir_with_metadata)
    return jax_triton


def _capturable_lowering(name: str, *, api_version: int, backend_config: Any, operand_output_aliases: Any):
    """In place of `jax.ffi.ffi_lowering` as jax-triton 0.3 calls it: the FFI target of the same plugin."""
    rule = jax.ffi.ffi_lowering(
        "triton_kernel_call_ffi", api_version=4, operand_output_aliases=operand_output_aliases
    )
    return functools.partial(rule, opaque=backend_config)


def _lower_by_xla(vendor: str, ctx: Any, *args: Any, **params: Any) -> Any:
    dtypes = tuple(jnp.dtype(aval.dtype).name for aval in (*ctx.avals_in, *ctx.avals_out))
    constants = tuple(params["constants"].items())
    launch = Launch(params["kernel"], dtypes, constants, params["num_warps"], params["num_stages"])
    # TTIR says nothing of the chip: XLA compiles it for the one at hand.
    name, ttir = _ttir(launch, "sm_90" if vendor == "cuda" else "gfx942")
    grid = dict(zip(("grid_x", "grid_y", "grid_z"), map(np.int32, (*params["grid"], 1, 1)), strict=False))
    warps, stages = np.int32(launch.num_warps), np.int32(launch.num_stages)
    aliases = dict(params["aliases"])
    rule = jax.ffi.ffi_lowering("__gpu$xla.gpu.triton", api_version=4, operand_output_aliases=aliases)
    return rule(ctx, *args, name=name, ir=ttir, num_warps=warps, num_stages=stages, debug=False, **grid)


mlir.register_lowering(_launch, functools.partial(_lower, "cuda"), platform="cuda")
mlir.register_lowering(_launch, functools.partial(_lower, "rocm"), platform="rocm")


# --- Triton's own compilers


@dataclasses.dataclass(frozen=True)
class Binary:
    """Machine code of a kernel: `code` is an ELF file, `assembly` its PTX or AMD assembly as text."""

    code: bytes
    assembly: str
    shared_bytes: int


def compile_offline(launch: Launch, arch: str) -> Binary:
    """Compiles a launch for "sm_90", "gfx942" and the like; no GPU and no toolkit is needed.

    Raises:
      Exception: whatever Triton's compiler raises where the kernel cannot be compiled for `arch`.
    """
    import triton

    source, target, options = _source(launch, arch)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    code, assembly = ("cubin", "ptx") if target.backend == "cuda" else ("hsaco", "amdgcn")
    return Binary(compiled.asm[code], compiled.asm[assembly], compiled.metadata.shared)


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
