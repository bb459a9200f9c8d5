"""Eight fake CPU devices for every test, and public functions checked against their shapes.

Programs of the tests are small and mostly compiled for one call: LLVM does not optimize them,
which took a third off the CPU time of three files. The quickstart, the notebook and the laboratory
are compiled as users compile them.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated function is checked at each call (under jit: while it is traced).
_HOOK = install_import_hook(["efficient", "models"], "shapes.checked")
