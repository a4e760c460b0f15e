"""`shardopt generate`: what a trained model makes of a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shardopt.commands import models, numbers
from shardopt.errors import InputError, nearest_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    models.add_arguments(parser)
    models.add_dtype(parser, "of the weights; by default as they are stored")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="how the text begins, '' for any; by default standard input")
    prompt.add_argument("--prompt-file", metavar="PATH", help="a file with it")
    parser.add_argument(
        "--max-new-tokens", type=numbers.at_least(1), default=128, metavar="N", help="by default %(default)s"
    )
    parser.add_argument(
        "--temperature", type=numbers.between(0, 100), default=0.8, metavar="T",
        help="by default %(default)s; 0 takes the most probable token each time",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=numbers.between(0, 1, least_too=False), default=1.0, metavar="P",
        help="choose among the most probable tokens that have P together; by default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=numbers.at_least(0), default=0, metavar="K",
        help="choose among the K most probable tokens; by default %(default)s, among all",
    )  # fmt: skip
    parser.add_argument("--seed", type=numbers.at_least(0), default=0, metavar="N", help="by default %(default)s")
    parser.add_argument(
        "--samples", type=numbers.at_least(1), default=1, metavar="N", help="texts, one after the other; by default 1"
    )
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    given = arguments
    prompt = _prompt(given)
    from shardopt.pretrain.continuation import Generator, Sampling
    from shardopt.pretrain.trained import one_process, opened

    ranks = one_process(given.device)
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p, given.top_k, given.seed)
    with opened(given.model, given.step, given.trust_remote_code) as trained:
        model = trained.model(models.dtype(given))
        generator = Generator(trained, model, prompt)
        trained.load(model, ranks.device, given.raw)
        if generator.room is not None and generator.room < given.max_new_tokens:
            room = f"the model has room for {generator.room:,} tokens after the prompt"
            print(f"warning: --max-new-tokens {given.max_new_tokens}: {room}", file=sys.stderr)
        for sample in range(given.samples):
            if given.samples > 1:
                print(f"{'' if sample == 0 else chr(10)}── sample {sample + 1}, seed {given.seed + sample} ──")
            generator.write(sampling, sample, _write)
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt(arguments: argparse.Namespace) -> str:
    """The prompt, without the line end that a file or a shell puts at its end."""
    given = arguments
    if given.prompt is not None:
        return _decoded("--prompt", given.prompt.encode("utf-8", "surrogateescape"))
    if given.prompt_file is not None:
        path = Path(given.prompt_file).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"--prompt-file: cannot read {path}: {error.strerror}{nearest_path(path)}") from error
        return _not_empty(f"--prompt-file {path}", content)
    if sys.stdin.isatty():
        raise InputError("give --prompt TEXT, --prompt-file PATH, or the prompt on standard input")
    return _not_empty("standard input", sys.stdin.buffer.read())


def _not_empty(where: str, content: bytes) -> str:
    """A prompt from a file or a shell; an empty one is more likely a mistake there than the wish for any text."""
    if prompt := _decoded(where, content).removesuffix("\n"):
        return prompt
    raise InputError(f"{where}: is empty; give the beginning of a text, or --prompt '' for any text")


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 text ({error})") from error
