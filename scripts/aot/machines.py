"""Machines that are not here: what XLA has to know of them to compile for them."""

import collections
import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX finds the plugins

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jax.experimental import topologies
from jax.interpreters import mlir

from pallas_kernels import Target, triton_call


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of GPU.

    Attributes:
      target: of its kernels.
      platform: XLA's word for it.
      memory_gib: of one.
      a_host: how many are in one host.
      device_info: `gpu_device_info` of XLA's target config, and what comes after it.
    """

    target: Target
    platform: str
    memory_gib: int
    a_host: int
    device_info: str


H200 = Machine(
    Target("cuda", "sm_90"),
    "cuda",
    memory_gib=141,
    a_host=8,
    device_info="""
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
""",
)

MI300X = Machine(
    Target("rocm", "gfx942"),
    "rocm",
    memory_gib=192,
    a_host=8,
    device_info="""
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 64
  shared_memory_per_block: 65536
  shared_memory_per_block_optin: 65536
  shared_memory_per_core: 65536
  threads_per_core_limit: 2048
  core_count: 304
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65536
  block_dim_limit_z: 65536
  memory_bandwidth: 5300000000000
  l2_cache_size: 4194304
  clock_rate_ghz: 2.1
  device_memory_size: 206158430208
  registers_per_core_limit: 131072
  registers_per_block_limit: 131072
  rocm_compute_capability { gcn_arch_name: "gfx942:sramecc+:xnack-" }
  name: "AMD Instinct MI300X"
}
platform_name: "ROCM"
dnn_version_info { }
device_description_str: "MI300X"
""",
)

KERNEL = "kernel"  # what kernels are called in compiled programs

MACHINES = {"h200": H200, "mi300x": MI300X}


def devices(machine: Machine, count: int) -> Sequence[Any]:
    """So many of them, in hosts of `a_host`; to be compiled for, nothing can be put on them."""
    _load_plugin(machine.platform)
    hosts, in_host = max(1, count // machine.a_host), min(count, machine.a_host)
    topology = topologies.get_topology_desc(
        topology_name="",
        platform=machine.platform,
        topology=f"1x{hosts}x{in_host}",
        target_config=machine.device_info,
    )
    return topology.devices


@functools.cache
def _load_plugin(platform: str) -> None:
    """Loads XLA's plugin for a vendor whose driver need not be here."""
    package, library, extension = {
        "cuda": ("jax_plugins.xla_cuda13", "xla_cuda_plugin.so", "jax_cuda13_plugin.cuda_plugin_extension"),
        "rocm": ("jax_plugins.xla_rocm7", "xla_rocm_plugin.so", "jax_rocm7_plugin.rocm_plugin_extension"),
    }[platform]
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / library
    if platform == "rocm":
        found = importlib.util.find_spec(extension)
        assert found is not None, f"{extension} is not installed"
        assert found.origin
        _make_rocm_stubs(path, Path(found.origin))
    xla_bridge.discover_pjrt_plugins = lambda: None  # would look for the driver
    for factories in (xla_bridge._backend_factories, xla_bridge._topology_factories):
        factories.pop(platform, None)
    options = {"platform_name": "ROCM"} if platform == "rocm" else {}
    c_api = xla_bridge.register_plugin(platform, library_path=str(path), priority=-1, options=options)
    calls = importlib.import_module(extension)
    name = platform.upper()
    xla_client.register_custom_type_handler(name, functools.partial(calls.register_custom_type, c_api))
    xla_client.register_custom_call_handler(name, functools.partial(calls.register_custom_call_target, c_api))
    for each, value in calls.ffi_types().items():
        xla_client.register_custom_type(each, value, platform=name)
    for each, value in calls.ffi_handlers().items():
        xla_client.register_custom_call_target(each, value, platform=name, api_version=1)


def _make_rocm_stubs(*libraries: Path) -> None:
    """Loads libraries in place of ROCm's, with the names that these need; their functions do nothing."""
    folder = Path(tempfile.mkdtemp(prefix="rocm-stubs-"))
    needed: set[str] = set()
    versions: dict[str, set[str]] = collections.defaultdict(set)  # by library
    versioned: dict[str, set[str]] = collections.defaultdict(set)  # functions, by version
    plain: set[str] = set()
    for library in libraries:
        dynamic, wanted, symbols = (
            subprocess.run(
                ["readelf", "-W", option, library], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-d", "-V", "--dyn-syms")
        )
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
        owner = ""
        for line in wanted.splitlines():
            if found := re.search(r"File: (\S+)", line):
                owner = found[1]
            if owner and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                versions[owner].add(found[1])
        for line in symbols.splitlines():
            columns = line.split()
            if len(columns) >= 8 and columns[6] == "UND" and columns[4] == "GLOBAL":
                name, _, version = columns[7].partition("@")
                (versioned[version.strip("@")] if version else plain).add(name)
    system = ("libc.so", "libm.so", "libdl.so", "libpthread", "librt.so", "ld-linux", "libstdc++", "libgcc")
    for name in sorted(each for each in needed if not each.startswith(system)):
        prefix = next((each for start, each in _ROCM_PREFIXES.items() if name.startswith(start)), None)
        own = {each for each in plain if prefix and each.startswith(prefix)}
        script = []
        for version in sorted(versions[name]):
            own |= versioned[version]
            script.append(
                f"{version} {{ global: {' '.join(each + ';' for each in sorted(versioned[version]))} }};"
            )
        source, names = folder / "stub.c", [each for each in sorted(own) if re.fullmatch(r"\w+", each)]
        source.write_text("\n".join(_stub(each) for each in names) + "\nint dsv4_stub;\n")
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", source, "-o", folder / name]
        if script:
            (folder / "stub.map").write_text("\n".join(script))
            command.append(f"-Wl,--version-script={folder / 'stub.map'}")
        subprocess.run(command, check=True)
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


# What functions of a library are called, where they have no version.
_ROCM_PREFIXES = {
    "libhipblaslt": "hipblasLt",
    "librocblas": "rocblas_",
    "libhipfft": "hipfft",
    "libMIOpen": "miopen",
    "librccl": "nccl",
    "librocm_smi64": "rsmi_",
    "librocprofiler-sdk": "rocprofiler_",
    "libamdhip64": "hip",
    "libhipsolver": "hipsolver",
    "libhipblas.": "hipblas",
    "libhipsparse": "hipsparse",
    "libroctx": "roctx",
}


def _stub(name: str) -> str:
    """In C: a function that says that there is no device (100)."""
    if "ErrorString" in name or "ErrorName" in name:
        return f'const char* {name}(int e) {{ return "no ROCm here"; }}'
    return f"int {name}(void) {{ return 100; }}"


def compile_kernels_for(machine: Machine) -> dict[Any, float]:
    """Has Triton kernels compiled for this machine, each once, and put into programs as opaque calls.

    Returns:
      What was compiled, with its seconds; it fills up while programs are lowered.
    """
    seconds: dict[Any, float] = {}

    def lower(ctx: Any, *args: Any, **params: Any) -> Any:
        launch = triton_call.Launch(
            params["kernel"],
            tuple(jnp.dtype(aval.dtype).name for aval in (*ctx.avals_in, *ctx.avals_out)),
            params["constants"],
            params["num_warps"],
            params["num_stages"],
        )
        if launch not in seconds:
            begin = time.perf_counter()
            triton_call.compile_offline(launch, machine.target.arch)
            seconds[launch] = time.perf_counter() - begin
        aliases = dict(params["aliases"])
        rule = jax.ffi.ffi_lowering(KERNEL, api_version=2, backend_config="", operand_output_aliases=aliases)
        return rule(ctx, *args)

    # Nothing runs, but XLA wants to know that there is something to call.
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    address = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    capsule = new_capsule(address, b"xla._CUSTOM_CALL_TARGET", None)
    xla_client.register_custom_call_target(KERNEL, capsule, platform=machine.platform.upper(), api_version=0)
    mlir.register_lowering(triton_call._launch, lower, platform=machine.platform)
    return seconds
