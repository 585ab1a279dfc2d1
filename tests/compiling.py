"""How XLA compiles in the suite and in the processes that it starts. Compiling is most of the suite's time."""

from importlib.metadata import version

_JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
# XLA's older code generator for fusions on CPUs takes half as long as the newer one. Later versions have only the newer one, and end the
# process if they read a flag that they do not know.
_HAS_OLDER = _JAXLIB < (0, 11)
_OLDER_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if _HAS_OLDER else ""

COMPILE_FAST = f"--xla_backend_optimization_level=0{_OLDER_EMITTERS}"
"""The flags of XLA: without optimisation."""

AS_USERS: dict[str, bool] = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLDER else {}
"""`compiler_options` for a test at the limit of fp32: the code generator of users, which rounds otherwise."""
