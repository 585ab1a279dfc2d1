"""How XLA compiles in the suite and in the processes that it starts. Compiling is most of the suite's time."""

from importlib.metadata import version

_JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
# XLA's older code generator for fusions on CPUs takes half as long as the newer one. Later versions have only the newer one, and end the
# process if they read a flag that they do not know.
_OLDER_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if _JAXLIB < (0, 11) else ""

COMPILE_FAST = f"--xla_backend_optimization_level=0{_OLDER_EMITTERS}"
"""The flags of XLA: without optimisation."""
