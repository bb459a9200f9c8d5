"""Eight fake CPU devices for every test, and public functions checked against their shapes.

Programs of the tests are small and mostly compiled for one call. So LLVM does not optimize them,
and XLA does without its newer emitters of fusions, where they can be turned off: a train step of a
small model compiles in 1.3 s instead of 2.5. The quickstart, the notebook and the laboratory are
compiled as users compile them.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Every annotated function is checked at each call (under jit: while it is traced).
_HOOK = install_import_hook(["efficient", "models"], "shapes.checked")


def pytest_configure(config):
    if jax.__version_info__ >= (0, 11):
        return  # where the flag may be unknown, which is fatal
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    jax.devices()  # reads it
    os.environ["XLA_FLAGS"] = flags  # libtpu does not know it
