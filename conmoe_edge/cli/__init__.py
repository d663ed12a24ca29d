"""The command line: arguments in, one call of ``conmoe_edge.api``, text or JSON out.

One file per command (``fit``, ``plan``, ``chat``, ``profiles``, ``doctor``); files with a leading
underscore serve them. This is the only folder that prints, and the only one that imports click,
rich and prompt_toolkit. Nothing in it imports torch before a command needs it, so that ``--help``
answers at once.
"""
