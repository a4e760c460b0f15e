"""Every figure that a run logs, against one computed another way.

The oracle is a loop in plain torch: transformers' own loss on whole batches, the update as the paper writes it in
float64, the learning rate from its definition, bytes counted in the files. A figure without an oracle here fails
`test_every_logged_figure_has_an_oracle`.
"""

import hashlib
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import wandb
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain import data, loop, model
from shardopt.pretrain.record import read_metrics
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny
from tests.pretrain.wandb_server import online, rows_on

PARAMETERS = 2 * 257 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
SINGLE = {"engine": "{name: single}"}
# Clipping at some steps and not at others, both warm-ups ending within the run, a decay on the matrices alone.
FIGURES = {
    "train__steps": 6,
    "train__grad_clip": 1.9,
    "optimizer__weight_decay": 0.1,
    "optimizer__alpha_warmup": 4,
    "optimizer__beta3_warmup": 5,
    "eval__every": 3,
    "eval__batches": 100,
    "data__holdout": 0.12,
    "tracking__layers_every": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    tiny.corpus(folder / "text")
    return folder


def rows_of(folder, name):
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


def prepared(config):
    return data.prepare(config.data, ALONE, config.run.seed, config.train.global_batch, stages=config.train.stages)


def held_out_loss(net, holdout, blocks):
    """Mean loss of `net`, in whatever mode it is, on the first held-out blocks; their bits per byte."""
    tokens = holdout.batch(0, min(blocks, holdout.n_blocks))
    with torch.no_grad():
        loss = net(input_ids=tokens, labels=tokens).loss.item()  # shifts the labels itself
    targets = tokens[:, 1:]
    text_bytes = (targets != holdout_eos(targets)).sum().item()  # a byte is a token; the end of a document is none
    return loss, loss * targets.numel() / math.log(2) / text_bytes


def holdout_eos(targets):
    return int(targets.max())  # the byte tokenizer's one token beyond the 256 bytes


def train_bytes_per_token(folder, share):
    """UTF-8 bytes over tokens of the training files: a token a byte and one for the end."""
    size = tokens = 0
    for path in (folder / "text").glob("*.txt"):
        hashed = hashlib.blake2b(path.read_bytes(), digest_size=8, person=b"holdout").digest()
        if int.from_bytes(hashed, "little") / 2**64 >= share:
            size, tokens = size + path.stat().st_size, tokens + path.stat().st_size + 1
    return size / tokens


def alpha_and_beta3(step, given):
    """Of step 1, 2, ...: linear, and linear in the half-life from beta1's to beta3's (arXiv 2409.03137, eq. 9)."""
    alpha = given.get("alpha", 5.0) * min(1.0, step / given["alpha_warmup"])
    share = min(1.0, step / given["beta3_warmup"])
    beta1, _, beta3 = given.get("betas", (0.9, 0.999, 0.9999))
    half_life = (1 - share) / math.log(beta1) + share / math.log(beta3)
    return alpha, math.exp(1 / half_life)


def learning_rate(step, config):
    """Of step 1, 2, ... under a linear warm-up and a cosine."""
    peak, warmup = config.optimizer.model_extra["lr"], config.schedule.warmup
    if step <= warmup:
        return peak * step / warmup
    lowest = peak * config.schedule.min_lr_ratio
    place = (step - warmup) / (config.train.steps - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * place)) / 2


def by_layer(net, value):
    """Root of the sum of `value(parameter)` over the parameters of each layer."""
    sums = {}
    for name, p in net.named_parameters():
        parts = name.removeprefix("model.").split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        sums[layer] = sums.get(layer, 0.0) + value(p)
    return {layer: math.sqrt(total) for layer, total in sums.items()}


class Noise:
    """The noise scale by its definition, from pieces of the batch: McCandlish et al., appendix A.1."""

    def __init__(self, few, ranks=2):
        self.ranks = range(ranks)
        self.few, self.trace, self.square, self.scales = few, 0.0, 0.0, []

    def add(self, net, tokens):
        def square(part):
            loss = net(input_ids=part, labels=part).loss
            return sum(g.double().square().sum().item() for g in torch.autograd.grad(loss, list(net.parameters())))

        taken = torch.cat([tokens[rank :: len(self.ranks)] for rank in self.ranks])  # as the ranks take them
        pieces, whole = taken.split(self.few), len(tokens)
        small, big = sum(map(square, pieces)) / len(pieces), square(tokens)
        self.square = 0.95 * self.square + 0.05 * (whole * big - self.few * small) / (whole - self.few)
        self.trace = 0.95 * self.trace + 0.05 * (small - big) / (1 / self.few - 1 / whole)
        assert self.square > 0
        self.scales.append(self.trace / self.square)


def oracle(folder, skipped=(), noises=(), **changes):
    """The rows of metrics of the run, by plain torch on one process; the steps `skipped` have a NaN for a loss."""
    config = tiny.config(folder, **changes)
    given = config.optimizer.model_extra
    train, holdout = prepared(config)
    eos = train.tokenizer.eos_token_id
    shape = model.transformers_config(config.model, train.vocab_size, eos, config.data.block_size)
    net = model.meta_model(shape)
    model.initialise(net, torch.device("cpu"), config.run.seed)
    beta1, beta2, _ = given.get("betas", (0.9, 0.999, 0.9999))
    state = {p: [torch.zeros(p.shape, dtype=torch.float64) for _ in range(3)] for p in net.parameters()}
    bytes_per_token = train_bytes_per_token(folder, config.data.holdout)
    rows, t, alpha, beta3, lr, seen = [], 0, 0.0, 0.0, 0.0, 0
    squares = dict.fromkeys(("m1", "m2", "update"), 0.0)
    for step in range(1, config.train.steps + 1):
        ramped = [one.global_batch for one in config.train.stages or () if one.from_step < step]
        tokens = train.batch(step - 1, 0, [config.train.global_batch, *ramped][-1])
        seen += tokens[:, 1:].numel()
        for noise in noises:
            noise.add(net, tokens)
        net.zero_grad()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in net.parameters()))
        lr = learning_rate(step, config)
        if step not in skipped:
            t += 1
            alpha, beta3 = alpha_and_beta3(t, given)
            clip = min(1.0, config.train.grad_clip / norm) if config.train.grad_clip is not None else 1.0
            squares = dict.fromkeys(squares, 0.0)
            gradients = by_layer(net, lambda p: p.grad.double().square().sum().item())
            weights = by_layer(net, lambda p: p.double().square().sum().item())
            before = {p: p.detach().clone() for p in net.parameters()}
            for p, (m1, m2, nu) in state.items():
                g = p.grad.double() * clip
                m1.mul_(beta1).add_(g, alpha=1 - beta1)
                m2.mul_(beta3).add_(g, alpha=1 - beta3)
                nu.mul_(beta2).add_(g * g, alpha=1 - beta2)
                update = (m1 / (1 - beta1**t) + alpha * m2) / ((nu / (1 - beta2**t)).sqrt() + 1e-8)
                decay = given["weight_decay"] if p.ndim > 1 else 0.0
                p.data.sub_((lr * (update + decay * p.double())).float())
                for name, value in (("m1", m1), ("m2", m2), ("update", update)):
                    squares[name] += value.square().sum().item()
        row = {
            "step": step,
            "tokens": seen,
            "loss": None if step in skipped else loss.item(),
            "bits_per_byte": None if step in skipped else loss.item() / math.log(2) / bytes_per_token,
            "lr": lr,
            "alpha": alpha,
            "beta3": beta3,
            "grad_norm": None if step in skipped else norm,
            **{f"{name}_norm": math.sqrt(square) for name, square in squares.items()},
            "skipped_steps": step - t,
        }
        if step % config.tracking.layers_every == 0 and step not in skipped:
            moved = by_layer(net, lambda p: (p - before[p]).double().square().sum().item())  # noqa: B023
            row |= {f"grad_norm/{layer}": value for layer, value in gradients.items()}
            row |= {f"update_ratio/{layer}": value / weights[layer] for layer, value in moved.items()}
        if step % config.eval.every == 0 or step == config.train.steps:
            blocks = config.eval.batches * config.train.global_batch
            row["eval_loss"], row["eval_bits_per_byte"] = held_out_loss(net, holdout, blocks)
        rows.append(row)
    return rows


TOLERANCE = {"eval_bits_per_byte": 2e-4}


def assert_same_figures(rows, expected):
    assert [set(row) - tiny.MEASURED for row in rows] == [set(row) for row in expected]
    for row, truth in zip(rows, expected, strict=True):
        for key, value in truth.items():
            said = f"{key} of step {truth['step']}"
            if value is None or isinstance(value, int):
                assert row[key] == value, said
            else:
                assert row[key] == pytest.approx(value, rel=TOLERANCE.get(key, 2e-4)), said


@pytest.fixture(scope="module")
def noises():
    """By the sequences of a piece that two ranks reduce at once, and of one process; filled by `expected`."""
    return {2: Noise(2), 4: Noise(4), "alone": Noise(2, ranks=1)}


@pytest.fixture(scope="module")
def expected(folder, noises):
    rows = oracle(folder, noises=noises.values(), **FIGURES)
    norms = [row["grad_norm"] for row in rows]
    assert min(norms) < FIGURES["train__grad_clip"] < max(norms)
    return rows


@pytest.fixture(scope="module")
def single(folder):
    """The run on one process: its result and its rows."""
    result = tiny.run(0, 1, folder, run__name="single", **FIGURES, **SINGLE)
    return result, rows_of(folder, "single")


def test_every_logged_figure_has_an_oracle(single, expected):
    logged = {key for row in single[1] for key in row}
    assert logged == {key for row in expected for key in row} | tiny.MEASURED


def test_logged_figures_are_those_of_a_loop_in_plain_torch(single, expected):
    assert_same_figures(single[1], expected)


def test_the_result_of_a_run_says_what_its_last_row_says(folder, single):
    result, rows = single
    assert (result.status, result.step, result.skipped) == ("finished", 6, 0)
    assert result.loss == rows[-1]["loss"]
    assert result.holdout_loss == rows[-1]["eval_loss"]
    assert result.holdout_bits_per_byte == rows[-1]["eval_bits_per_byte"]
    assert result.checkpoint == folder / "runs" / "single" / "checkpoints" / "step-00000006"


ENGINES = {
    "zero-1": "{name: zero, stage: 1}",
    "zero-2": "{name: zero, stage: 2, bucket_mb: 0.01}",
    "fsdp": "{name: fsdp}",
    "ddp": "{name: ddp}",
}


def _runs(rank, world_size, folder, engines, changes):
    for name, engine in engines.items():
        tiny.run(rank, world_size, folder, run__name=name, engine=engine, **changes)


def test_two_ranks_log_the_figures_of_the_whole_model_and_batch(folder, expected, noises):
    _, holdout = prepared(tiny.config(folder, **FIGURES))
    assert holdout.n_blocks % 4 in (1, 2)  # of the last micro-batches of 2 rank 1 has none
    on_ranks(2, _runs, folder, ENGINES, FIGURES | {"tracking__noise_scale": True})
    for name in ENGINES:
        rows = rows_of(folder, name)
        scales = [row.pop("noise_scale") for row in rows]
        # Stage 1 and DDP reduce once a step, of four sequences, the others each micro-batch of two.
        assert scales == pytest.approx(noises[4 if name in ("zero-1", "ddp") else 2].scales, rel=1e-3), name
        assert_same_figures(rows, expected)


def test_figures_follow_a_batch_that_grows(folder):
    """Also the noise scale, of ranks that reduce two sequences at once whatever the batch is."""
    noise, changes = Noise(2), FIGURES | {"train__stages": "[{from_step: 3, global_batch: 16}]"}
    truth = oracle(folder, noises=[noise], **changes)
    on_ranks(2, _runs, folder, {"ramped": ENGINES["zero-2"]}, changes | {"tracking__noise_scale": True})
    rows = rows_of(folder, "ramped")
    assert [row.pop("noise_scale") for row in rows] == pytest.approx(noise.scales, rel=1e-3)
    assert_same_figures(rows, truth)


def test_one_process_measures_the_noise_scale_from_its_micro_batches(folder, expected, noises):
    tiny.run(0, 1, folder, run__name="noise", tracking__noise_scale=True, **FIGURES, **SINGLE)
    rows = rows_of(folder, "noise")
    assert [row.pop("noise_scale") for row in rows] == pytest.approx(noises["alone"].scales, rel=1e-3)
    assert_same_figures(rows, expected)


def test_a_noise_scale_that_cannot_be_measured_is_refused(folder):
    said = (
        r"tracking\.noise_scale: needs engine\.name zero, ddp or fsdp and at least 2 .* has engine\.name single on "
        r"1 rank\(s\), train\.micro_batch 8 and train\.global_batch 8$"
    )
    with pytest.raises(InputError, match=said):
        tiny.run(0, 1, folder, run__name="no-noise", tracking__noise_scale=True, train__micro_batch=8, **SINGLE)


def test_a_row_averages_the_loss_since_the_row_before(folder, expected):
    tiny.run(0, 1, folder, run__name="every-2", tracking__log_every=2, **FIGURES, **SINGLE)
    rows = rows_of(folder, "every-2")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]  # step 3 is evaluated
    mean = [sum(row["loss"] for row in expected[a:b]) / (b - a) for a, b in [(0, 2), (2, 3), (3, 4), (4, 6)]]
    assert [row["loss"] for row in rows] == pytest.approx(mean, rel=1e-4)


class Watched:
    """Calls `at_step(step)` in the timed part of a step and `at_evaluation()` in every batch of an evaluation."""

    def __init__(self, patch, at_step=lambda step: None, at_evaluation=lambda: None):
        train_batch, held_out_batch = data.Batches.batch, data.HoldoutData.batch
        self.step = None

        def batch(this, step):
            self.step = step + 1
            at_step(step + 1)
            return train_batch(this, step)

        def evaluate(this, start, stop):
            at_evaluation()
            return held_out_batch(this, start, stop)

        patch.setattr(data.Batches, "batch", batch)
        patch.setattr(data.HoldoutData, "batch", evaluate)


@pytest.fixture
def bad_steps(monkeypatch):
    """Steps, from 1, whose logits in training are NaN."""
    bad, watched = set(), Watched(monkeypatch)

    def spoil(module, args, output):
        if type(module) is torch.nn.Linear and module.out_features > 256 and torch.is_grad_enabled():
            return output * math.nan if watched.step in bad else output
        return None

    handle = torch.nn.modules.module.register_module_forward_hook(spoil)
    yield bad
    handle.remove()


def test_a_skipped_step_counts_for_data_and_lr_and_not_for_the_averages(folder, bad_steps):
    truth = oracle(folder, skipped={2, 4}, **FIGURES)
    bad_steps.update({2, 4})
    result = tiny.run(0, 1, folder, run__name="skipped", **FIGURES, **SINGLE)
    assert_same_figures(rows_of(folder, "skipped"), truth)
    assert (result.step, result.skipped) == (6, 2)


def test_tokens_per_second_are_of_the_steps_and_not_of_the_evaluations(folder, monkeypatch):
    now = [1000.0]

    def wait(seconds):
        now[0] += seconds

    Watched(monkeypatch, at_step=lambda step: wait(0.25 * step), at_evaluation=lambda: wait(100.0))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    tiny.run(0, 1, folder, run__name="clock", tracking__log_every=2, **FIGURES, **SINGLE)
    tokens = 8 * 32
    assert [(row["step"], row["tokens_per_second"]) for row in rows_of(folder, "clock")] == [
        (2, pytest.approx(2 * tokens / 0.75)),
        (3, pytest.approx(tokens / 0.75)),
        (4, pytest.approx(tokens / 1.0)),
        (6, pytest.approx(2 * tokens / 2.75)),
    ]


def test_memory_is_the_most_that_the_process_has_held(folder, monkeypatch):
    process, held = psutil.Process(), {}

    def allocate(step):
        highest = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        if step == 3:  # 64 MiB beyond the highest so far, and let go
            block = torch.ones((highest - process.memory_info().rss + 2**26) // 4)
            held["block"] = process.memory_info().rss
            del block
        held[step] = highest

    Watched(monkeypatch, at_step=allocate)
    tiny.run(0, 1, folder, run__name="memory", train__steps=4, **SINGLE)
    rows = [row["memory_bytes"] for row in rows_of(folder, "memory")]
    assert rows == sorted(rows)
    assert held[1] <= rows[0] <= held[2] <= rows[1] <= held[3]
    assert rows[3] == pytest.approx(held["block"], rel=0.01)


def test_the_console_shows_the_logged_figures(folder, capsys):
    changes = FIGURES | {"checkpoint__export": "true"}
    result = tiny.run(0, 1, folder, run__name="console", **changes, **SINGLE)
    said, rows = capsys.readouterr().out, rows_of(folder, "console")
    lines = re.findall(r"^step ([\d,]+)/6  loss (\d+\.\d+) +([\d.]+[kM]?) tokens/s", said, re.M)
    assert [(int(step), float(loss)) for step, loss, _ in lines] == [(r["step"], round(r["loss"], 4)) for r in rows]
    for (_, _, rate), row in zip(lines, rows, strict=True):
        number = float(rate.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(rate[-1], 1)
        assert number == pytest.approx(row["tokens_per_second"], rel=0.06)
    last = rows[-1]
    held = f"{last['eval_loss']:.4f}, {last['eval_bits_per_byte']:.3f} bits per byte"
    assert f"step 6: held-out loss {held}" in said
    assert re.search(rf"train loss +{last['loss']:.4f} at step 6", said)
    assert re.search(rf"held-out loss +{held}", said)
    assert re.search(rf"tokens seen +{last['tokens']:,} in", said)
    net = AutoModelForCausalLM.from_pretrained(result.export)
    assert re.search(rf"model +{sum(p.numel() for p in net.parameters()):,} parameters", said)
    train, _ = prepared(tiny.config(folder, **changes))
    texts = [path.read_bytes() for path in (folder / "text").glob("*.txt")]
    assert re.search(rf"data +{train.tokens:,} tokens", said)
    assert train.tokens < sum(len(text) + 1 for text in texts)


# Evaluation and sampling


DROPOUT = {"model__attention_dropout": 0.5, "train__steps": 6, "eval__batches": 100} | SINGLE


def test_held_out_loss_and_sample_are_those_of_the_export_without_dropout(folder):
    result = tiny.run(0, 1, folder, run__name="dropout", eval__sample_tokens=24, checkpoint__export="true", **DROPOUT)
    net = AutoModelForCausalLM.from_pretrained(result.export).eval()
    assert net.config.attention_dropout == 0.5
    _, holdout = prepared(tiny.config(folder, **DROPOUT))
    loss, bits = held_out_loss(net, holdout, 800)
    assert result.holdout_loss == pytest.approx(loss, rel=1e-5)
    assert result.holdout_bits_per_byte == pytest.approx(bits, rel=TOLERANCE["eval_bits_per_byte"])
    with torch.no_grad():
        spoilt, _ = held_out_loss(net.train(), holdout, 800)
    assert spoilt != pytest.approx(loss, rel=1e-4)  # else this test would not notice

    tokenizer, net = AutoTokenizer.from_pretrained(result.export), net.eval()
    draw = torch.Generator().manual_seed(0)
    ids, cache, tokens = torch.tensor([[tokenizer.eos_token_id]]), None, []
    for _ in range(24):
        with torch.no_grad():
            out = net(ids, past_key_values=cache, use_cache=True)  # a token at a time
        cache = out.past_key_values
        ids = torch.multinomial(torch.softmax(out.logits[:, -1] / 0.8, -1), 1, generator=draw)
        tokens.append(ids.item())
    assert result.sample == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(result.sample) > 5


def test_evaluation_leaves_training_as_it_would_be_without(folder):
    """Dropout goes on afterwards, from the same random numbers."""
    tiny.run(0, 1, folder, run__name="often", eval__every=1, **DROPOUT)
    tiny.run(0, 1, folder, run__name="never", eval__every=100, **DROPOUT)
    often, never = rows_of(folder, "often"), rows_of(folder, "never")
    assert [row["loss"] for row in often] == [row["loss"] for row in never]
    assert sum("eval_loss" in row for row in often) == 6
    assert sum("eval_loss" in row for row in never) == 1


def test_a_resumed_run_logs_what_an_unbroken_one_does(folder, monkeypatch, bad_steps):
    bad_steps.add(2)
    changes = FIGURES | SINGLE
    tiny.run(0, 1, folder, run__name="unbroken", **changes)
    with monkeypatch.context() as patch:
        Watched(patch, at_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)
        stopped = tiny.run(0, 1, folder, run__name="broken", **changes)
    assert (stopped.status, stopped.step, stopped.skipped) == ("stopped", 4, 1)
    assert stopped.holdout_loss is None
    resumed = tiny.run(0, 1, folder, run__name="broken", **changes)
    assert (resumed.status, resumed.step, resumed.skipped) == ("finished", 6, 1)
    broken, unbroken = rows_of(folder, "broken"), rows_of(folder, "unbroken")
    for row in broken + unbroken:
        for key in tiny.MEASURED:
            row.pop(key)
    assert broken == unbroken


# W&B


def test_wandb_has_every_row_and_says_how_the_run_ended(folder, home, backend, monkeypatch, bad_steps):
    changes = {"train__steps": 4, "eval__every": 2, "tracking__wandb__mode": "auto"} | SINGLE
    online(backend, home)

    def run(name, **more):
        return tiny.run(0, 1, folder, run__name=name, **changes, **more)

    run("finished")
    with monkeypatch.context() as patch:
        Watched(patch, at_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None)
        run("interrupted")
    bad_steps.update({2, 3, 4})
    with pytest.raises(loop.NonFiniteError):
        run("failed", train__max_nonfinite_steps=1)
    wandb.teardown()  # its service has then written everything

    told = {run["displayName"]: (run_id, run) for run_id, run in backend.runs.items()}
    for name, steps, code in (("finished", 4, 0), ("interrupted", 3, 255), ("failed", 3, 1)):
        run_id, run = told[name]
        assert run["exit_code"] == code, name
        rows = rows_of(folder, name)
        assert len(rows) == steps
        logged = [{k: v for k, v in row.items() if k != "samples"} for row in rows_on(backend, run_id)]
        assert [{k: None if math.isnan(v) else v for k, v in row.items()} for row in logged] == rows
        about = json.loads(run["config"])["about"]["value"]
        assert about["world_size"] == 1
        assert about["parameters"] == PARAMETERS
    summary = told["finished"][1]["summary"]
    losses = [row["eval_loss"] for row in rows_of(folder, "finished") if "eval_loss" in row]
    assert (summary["final_eval_loss"], summary["best_eval_loss"]) == (losses[-1], min(losses))
