"""Whether the code of a module is the usual one, by the names that it uses.

The operator answers for whole pieces of a model (``attention.py``, ``decoder_layer.py``) without knowing the model's
class. That it computes the same is seen on a token; that nothing else can happen on another token is seen here: code
that uses no name but those of the usual piece has no switch, no table and no function that the operator does not know.

Pure, but for looking at a class. Raises nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import CodeType

from torch import nn


def speaks_only_of(
    module: nn.Module, names: Collection[str], arguments: Collection[str] | None = None
) -> bool:
    """Whether the class's ``forward`` uses no global, attribute or text but ``names``, and has no function inside.

    Args:
        module: one whose ``forward`` is its class's.
        names: those that are known.
        arguments: those that it may have by position or name beside ``self``; ``None`` for any.
    """
    if "forward" in vars(module):
        return False
    forward = type(module).forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if not isinstance(code, CodeType):
        return False
    if arguments is not None and not set(code.co_varnames[1 : code.co_argcount]) <= set(arguments):
        return False
    if any(isinstance(one, CodeType) for one in code.co_consts):
        return False
    texts = {one for one in code.co_consts if isinstance(one, str)} - {forward.__doc__}
    return {*code.co_names, *texts} <= set(names)


def as_they_were(
    module: nn.Module, parts: dict[str, nn.Module], called: Collection[str] = ()
) -> bool:
    """Whether the children of ``module`` are still ``parts``, and nobody watches a call of one of them that is not
    ``called`` anyway.
    """
    children = module._modules
    if len(children) != len(parts):
        return False
    for name, part in parts.items():
        watched = part._forward_hooks or part._forward_pre_hooks
        if children.get(name) is not part or (watched and name not in called):
            return False
    return True
