"""`shardopt completion`."""

from __future__ import annotations

import argparse

_SCRIPT = """\
# bash completion of shardopt; in zsh after: autoload -U +X bashcompinit && bashcompinit
_shardopt() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    # The value of a key follows at once.
    [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}}
complete -o default -F _shardopt shardopt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("shell", choices=["bash"], nargs="?", default="bash", help="by default %(default)s")
    parser.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    from shardopt import cli, commands
    from shardopt.pretrain import keys

    names = sorted({key.name for group in keys.groups() for key in group.keys})
    parsers = {cli.PRETRAIN: cli.parser()} | {name: commands.parser(name) for name in commands.COMMANDS}
    cases = []
    for name, parser in parsers.items():
        words = _words(parser)
        if name == "config":
            words += names
        elif name == cli.PRETRAIN or commands.COMMANDS[name].overrides:
            words += [f"{key}=" for key in names if not key.startswith("data.sources.")]  # which is a list
        cases.append(f'            {name}) words="{" ".join(words)}" ;;')
    print(_SCRIPT.format(commands=" ".join(parsers), cases="\n".join(cases)), end="")
    return 0


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser and the names of its commands, with their options."""
    words = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            words += [word for name, inner in action.choices.items() for word in (name, *_words(inner))]
    return list(dict.fromkeys(words))
