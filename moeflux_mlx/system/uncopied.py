"""Base classes of objects with threads, files or slots, which refuse copies."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from ..errors import ModelError


class Unpickled:
    """Refuses to be pickled; copies like any object."""

    def __copy__(self) -> Any:
        new = _empty(self)
        if isinstance(self, dict):
            dict.update(new, self)
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = _empty(self)
        if isinstance(self, dict):
            dict.update(new, {k: copy.deepcopy(v, memo) for k, v in self.items()})
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse.

        Raises:
            ModelError: always; the message names the alternative.
        """
        raise ModelError(
            f"[pickle] expected arrays or a model of mlx-lm's class but got "
            f"{type(self).__name__}, which holds threads, files or compiled work: load "
            "the model again where it is needed, or save it with "
            "mlx_lm.utils.save_model"
        )


class Uncopied(Unpickled):
    """Refuses to be pickled or deep-copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refuse.

        Raises:
            ModelError: always; the message names the alternative.
        """
        raise ModelError(
            "[copy] expected a model with its experts among its parameters but got "
            f"{type(self).__name__} of one that reads them from files: load it a "
            "second time"
        )


def _empty(like: object) -> Any:
    kind: type = type(like)
    return dict.__new__(kind) if issubclass(kind, dict) else object.__new__(kind)
