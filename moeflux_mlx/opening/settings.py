"""Check every environment variable before a model is loaded.

Otherwise an unusable value would be an error in the middle of a request.
"""

from __future__ import annotations

from .. import config
from ..engine.executors import EXECUTORS, default_executor
from ..engine.lowering.registry import requested_ways
from ..engine.lowering.tuned import current
from ..errors import BackendError
from ..experts.pool.budget import AUTO, parse_bytes
from ..experts.pool.policy import policy_factory


def check_settings() -> None:
    """Raise an error unless every environment variable has a usable value.

    Raises:
        ConfigError: a variable, which the message names, has an unusable value.
        BackendError: there is no executor of this name.
        TraceError: the routing trace that ``MOEFLUX_POLICY`` names is unusable.
    """
    amounts = {"MEMORY": config.memory(), "EXPERT_MEMORY": config.expert_memory()}
    for name, amount in amounts.items():
        if amount is not None and (name, amount) != ("MEMORY", AUTO):
            parse_bytes(amount, f"MOEFLUX_{name}")
    executor = config.executor_name() or default_executor()
    if executor not in EXECUTORS:
        raise BackendError(
            f"[MOEFLUX_EXECUTOR] expected one of {', '.join(EXECUTORS)} but got "
            f"{executor!r}"
        )
    if (policy := config.policy()) is not None:
        policy_factory(policy, "MOEFLUX_POLICY")
    config.check()
    requested_ways()
    current(executor)
