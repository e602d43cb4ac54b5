"""Every error a user can meet, typed by the part that raises it.

Messages read ``[part] what was expected but got what`` and name the file, layer,
expert or argument at fault.
"""


class MoefluxError(Exception):
    """Base of every error raised on purpose by moeflux-mlx."""


class BackendError(MoefluxError, ImportError):
    """No usable MLX backend, or an executor that cannot run here."""


class ConfigError(MoefluxError, ValueError):
    """An argument or environment variable has a value that cannot be used."""


class GraphError(MoefluxError):
    """An Op was given the wrong role, shape or field."""


class SizeMismatch(GraphError):
    """A buffer and the host bytes meant for it differ in size."""

    def __init__(self, label: str, expected: int, actual: int):
        self.label, self.expected, self.actual = label, expected, actual
        super().__init__(
            f"[BufferPool] {label!r} holds {expected} bytes but got {actual}"
        )


class ModelError(MoefluxError, ValueError):
    """A model directory, its configuration or its input is not usable."""


class ExpertStoreError(MoefluxError):
    """Expert files are missing, damaged, unreadable or of another model."""


class BudgetError(ExpertStoreError, ValueError):
    """The memory budget cannot hold what one token needs."""


class StateError(MoefluxError, ValueError):
    """A saved state is damaged or of another model, or caches cannot be kept."""


class TraceError(MoefluxError, ValueError):
    """A recording of routing is missing, damaged or of another model."""


class KernelError(MoefluxError, ValueError):
    """A kernel's source, arguments or launch are not what its signature says."""


class SimulatorError(MoefluxError):
    """A kernel does not compile for the simulator, or did something wrong there."""
