"""Many short runs in one process: the stages of `jaxalign train`, without its run folders.

Models and data are read once, programs are compiled once for all seeds and learning rates of a
config, and no checkpoints are written: what a run leaves is its metrics and its parameters.
"""

import dataclasses
import functools
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.rows import Rows
from experiments.runs import DATA
from jaxalign.backends import Decoding
from jaxalign.backends.local import LocalModel, end_tokens
from jaxalign.config import PreferenceConfig, TrainConfig, to_json
from jaxalign.data import load_tokenizer, pair_batches, preference_records, split_holdout
from jaxalign.data.packing import Packing
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.files import write_json, write_json_lines
from jaxalign.models import DecoderConfig
from jaxalign.sharding import make_mesh, place
from jaxalign.stages import Kind, RunContext, kind_of
from jaxalign.stages.inputs import Inputs, TokenizedData, as_examples
from jaxalign.stages.ledger import LEDGER
from jaxalign.stages.models import as_model, initial_model
from jaxalign.training.checkpoints import Checkpoints
from jaxalign.training.loop import run_stage
from jaxalign.training.stage import Feed, Stage, Step
from jaxalign.training.step import TrainState, compile_step, initial_state

KEPT = ("rewards/accuracies", "logps/chosen", "logps/rejected", "logps/accuracies", "kl", "loss")
"""Held-out metrics that a row keeps, of every source."""
MEASURED = tuple(
    f"entanglement/{name}"
    for name in (
        *("cosine", "norm_ratio", "in_band", "d_w", "d_l"),
        *("ideal", "both_down", "both_up", "reversed"),
    )
)
"""Statistics of gradients that a row keeps, beside the ledger."""
HELD_OUT = {"polite": 0.2, "ultrafeedback": 0.25}
"""Fraction of the prompts in the test split, by source."""
SWEEP = 0.12
"""Fraction of the other prompts on which learning rates are chosen."""


class OutOfTime(Exception):  # noqa: N818 (not an error: the user set the time)
    """The time of the study is over."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The models, data and sizes of the studies of a chat model."""

    model: str
    """Chat model: Hugging Face folder or name, or GGUF file."""
    second: str | None = None
    """Model of another family, for a few runs; None: these are left out."""
    polite: str = str(DATA / "preferences" / "rasbt_instruction_preference.jsonl")
    """Pairs of polite and impolite answers."""
    ultrafeedback: tuple[str, ...] = (
        str(DATA / "preferences" / "ultrafeedback_train.jsonl"),
        str(DATA / "preferences" / "ultrafeedback_eval.jsonl"),
    )
    """Pairs of UltraFeedback; their splits are made again, by prompt."""
    questions: str = str(DATA / "urial" / "mt_bench_question.jsonl")
    """Questions of MT-bench, for answers before and after."""
    output: Path = Path("runs/small")
    """Folder of splits, caches and logs."""
    rows: Path = Path("runs/small/rows")
    """Folder of the rows: a file for every finished run, which is not run again."""
    cells: tuple[str, ...] = ()
    """Beginnings of the names of the cells to run, e.g. offline/dpo; none: all."""
    workers: int = 1
    """Number of processes that share the cells, and the device."""
    minutes: float | None = None
    """Time after which nothing is begun and what runs is stopped; None: no limit."""
    until: float | None = None
    """The same as a Unix time, for the processes that a command starts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Computation of the losses' comparison; auto: bfloat16 on a GPU, else float32. Gradients are
    always measured in float32."""
    steps: int | None = None
    """Updates of every run, in place of the studies' own."""
    pairs: int | None = None
    """Pairs in a batch, in place of the studies' own."""
    max_length: int | None = None
    """Most tokens of prompt and response, in place of the studies' own; longer ones are cut."""
    longest: int = 1900
    """Most characters of a prompt of UltraFeedback and its longer response; longer pairs are left
    out."""
    rates: tuple[float, ...] = (2e-6, 1e-5, 4e-5)
    """Learning rates of the comparison of losses; of several, each loss takes the best."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the comparison of losses, the first for the choice of the rate."""
    held_out: int = 128
    """Largest number of held-out pairs of each source."""

    def data(self, source: str, split: str) -> str:
        """The file of a split."""
        return str(self.output / "data" / f"{source}_{split}.jsonl")


def write_splits(options: Options) -> None:
    """Write the splits `train`, `sweep` and `test` of both sources; existing files are kept."""
    files = {"polite": (options.polite,), "ultrafeedback": options.ultrafeedback}
    for source, paths in files.items():
        if Path(options.data(source, "train")).is_file():
            continue
        most = options.longest if source == "ultrafeedback" else None
        read = [r for path in paths for r in preference_records(path, bad_records="skip")]
        used = [
            r
            for r in read
            if most is None
            or len(str(r.prompt)) + max(len(str(r.chosen)), len(str(r.rejected))) <= most
        ]
        rest, test = split_holdout(used, HELD_OUT[source])
        train, sweep = split_holdout(rest, SWEEP, seed=1)
        for split, records in (("test", test), ("sweep", sweep), ("train", train)):
            path = Path(options.data(source, split))
            path.parent.mkdir(parents=True, exist_ok=True)
            fields = ("prompt", "chosen", "rejected")
            write_json_lines(path, [{x: getattr(r, x) for x in fields} for r in records])
            print(f"{path}: {len(records):,} pairs of {len(read):,}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model from which runs start."""

    name: str
    path: str
    """Of the weights that were loaded, and of the tokenizer."""
    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has ended."""

    params: Any
    lines: Sequence[Mapping[str, Any]]
    """Of the metrics, as in `metrics.jsonl`."""
    tokens: Mapping[str, Any]
    """Sums of the ledger over the run by pairs, side and token; empty without a ledger."""
    seconds: float
    cpu_seconds: float
    evaluation: Callable[[TrainState, Any], dict[str, float]] | None
    frozen: Any

    def row(self, config: TrainConfig, stage: str, **more: Any) -> dict[str, Any]:
        """The row of the run: its settings, held-out metrics and those of every step."""
        settings = getattr(config, stage)
        rule = settings.optimizer
        return {
            "stage": stage,
            "loss": getattr(settings, "loss", "sft"),
            "optimizer": rule.name,
            "learning_rate": rule.learning_rate,
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "seed": config.seed,
            "dtype": config.dtype,
            "device": jax.devices()[0].device_kind,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "trained_tokens": sum(x["tokens"] for x in self.lines if x["split"] == "train"),
            "peak_memory": peak_memory(),
            **more,
            "held_out": curves(self.lines, "eval", held_out_metric),
            "training": curves(self.lines, "train", training_metric),
            "tokens": dict(self.tokens),
        }


def peak_memory() -> int:
    """Most bytes that this process has held, of the device or else of the host."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(statistics.get("peak_bytes_in_use", most))


def held_out_metric(name: str) -> bool:
    """Whether a row keeps a held-out metric."""
    return name.endswith(KEPT) and not name.startswith("calibration")


def training_metric(name: str) -> bool:
    """Whether a row keeps a metric of the training batches."""
    return name in ("loss", "grad_norm", *MEASURED) or name.startswith("entanglement/ledger/")


def curves(
    lines: Sequence[Mapping[str, Any]], split: str, keep: Callable[[str], bool]
) -> dict[str, dict[str, list[float]]]:
    """Metric -> its steps and values."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line["split"] != split:
            continue
        for name, value in line.items():
            if keep(name) and np.isfinite(value):
                one = found.setdefault(name, {"step": [], "value": []})
                one["step"].append(line["step"])
                one["value"].append(float(value))
    return found


class PeakState(NamedTuple):
    """State of `with_peak`."""

    others: Any
    peak: Any


def with_peak(peak: float, others: optax.GradientTransformation) -> optax.GradientTransformation:
    """An update rule whose peak learning rate is 1, times another peak, which is in its state.

    So one compiled step serves all rates. The rule must be linear in its rate, as AdamW and SGD
    are.
    """

    def init(params: Any) -> PeakState:
        return PeakState(others=others.init(params), peak=jnp.float32(peak))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PeakState]:
        updates, inner = others.update(updates, state.others, params)
        scaled = jax.tree.map(lambda x: state.peak * x, updates)
        return scaled, PeakState(others=inner, peak=state.peak)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True, kw_only=True)
class FewLengths(TokenizedData):
    """Data whose batches are padded to at most `buckets` lengths, the same for all seeds."""

    buckets: int

    def _batches(self, data: Any, packing: Packing | None, **order: Any) -> Any:
        assert packing is None
        return pair_batches(as_examples(data), buckets=self.buckets, **order)


class _Unsaved(Checkpoints):
    """In place of checkpoints: nothing is written."""

    def __init__(self) -> None:
        """Touch no folder."""

    def latest(self) -> int | None:
        return None

    def committed(self) -> int:
        return 0

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        del step, state, meta

    def wait(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """A writer of metrics that keeps them."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def write(self, stage: str, split: str, step: int, values: Mapping[str, float | int]) -> None:
        del stage
        self.lines.append({"split": split, "step": step, **values})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Programs:
    """The compiled steps of a config, and its evaluation."""

    plain: Step
    others: Sequence[tuple[Step, int]]
    evaluation: Callable[[TrainState, Any], dict[str, float]] | None


class Bench:
    """What the runs of a process share.

    Args:
      options: of the studies.
      until: Unix time after which a run is stopped; None: never.
    """

    def __init__(self, options: Options, until: float | None = None):
        self.options, self.until = options, until
        self.mesh = make_mesh(devices=jax.local_devices()[:1])
        self._starts: dict[str, Start] = {}
        self._data: dict[str, Any] = {}
        self._programs: dict[str, _Programs] = {}

    @property
    def seconds_left(self) -> float:
        """Until the time is over."""
        return float("inf") if self.until is None else self.until - time.time()

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the comparison of losses."""
        if self.options.dtype != "auto":
            return self.options.dtype
        return "bfloat16" if self.is_gpu else "float32"

    @property
    def is_gpu(self) -> bool:
        """Whether few programs matter more than padding, and memory is shared."""
        return jax.default_backend() == "gpu"

    @property
    def unpacked(self) -> dict[str, Any]:
        """The fields of a stage whose batches have the same few shapes in every run, on a GPU."""
        return {"packing": "never"} if self.is_gpu else {}

    def preference(self, **settings: Any) -> PreferenceConfig:
        """A preference stage; on a GPU its batches have the same few shapes in every run."""
        alone = {"share_prompts": "never"} if self.is_gpu else {}
        return PreferenceConfig(reference="live", **self.unpacked, **alone, **settings)

    def rows(self, study: str) -> Rows:
        """The rows of a study."""
        return Rows(folder=self.options.rows / study)

    def model(self, path: str) -> Start:
        """A model in float32, read once."""
        if path not in self._starts:
            tokenizer = load_tokenizer(path)
            config, params = initial_model(TrainConfig(model=path), tokenizer, self.mesh)
            assert isinstance(config, DecoderConfig)
            self._starts[path] = Start(
                name=path, path=path, config=config, params=params, tokenizer=tokenizer
            )
        return self._starts[path]

    def forget_programs(self) -> None:
        """Free the programs of the runs so far."""
        self._programs.clear()

    def run(
        self,
        start: Start,
        config: TrainConfig,
        stage_name: str,
        *,
        buckets: int = 2,
        held_out: bool = True,
    ) -> Finished:
        """Train one stage of a config.

        Args:
          start: the model, in place of the config's.
          config: of the run; its stage has steps, not epochs.
          stage_name: sft, preference or feedback.
          buckets: most lengths to pad to on a GPU; elsewhere batches are those of `train`.
          held_out: whether to evaluate on held-out data.

        Raises:
          OutOfTime: the time is over.
        """
        began, cpu = time.perf_counter(), time.process_time()
        kind, unit, peak = with_unit_rate(config, stage_name)
        folder = self.options.output / "work" / config.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LEDGER).unlink(missing_ok=True)
        data = self._loaded(kind, unit, start, folder, buckets)
        unit = kind.settle(unit, data)
        context = RunContext(
            config=unit,
            folder=folder,
            mesh=self.mesh,
            model_config=start.config,
            tokenizer=start.tokenizer,
            data={kind.name: data},
            writers=(),
        )
        stage = kind.build(unit, start.config)
        optimizer = with_peak(peak, stage.optimizer)
        put = functools.partial(place, mesh=self.mesh)
        trained = stage.trained(stage.begin(start.params, put))
        frozen = stage.frozen(start.params, put, _no_other_model)
        feed = kind.feed(context, stage, start.params, frozen)
        fresh = initial_state(trained, optimizer=optimizer, seed=config.seed, running=stage.running)
        state = put(fresh)
        programs = self._compiled(unit, start, stage, optimizer, feed, state)
        lines = _Lines()

        def progress(step: int, values: Mapping[str, float]) -> None:
            del step, values
            if self.seconds_left <= 0:
                raise OutOfTime

        state = run_stage(
            stage,
            dataclasses.replace(feed, evaluation=programs.evaluation if held_out else None),
            state=state,
            frozen=frozen,
            step=lambda done: feed.around(_step_at(programs, done)),
            checkpoints=_Unsaved(),
            writers=[lines],
            nonfinite="stop",
            progress=progress,
        )
        return Finished(
            params=stage.kept(state.params),
            lines=lines.lines,
            tokens=moved_tokens(folder / LEDGER),
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - cpu,
            evaluation=programs.evaluation,
            frozen=frozen,
        )

    def evaluate(self, finished: Finished, params: Any) -> dict[str, float]:
        """The held-out metrics of other parameters, by the evaluation of a run."""
        assert finished.evaluation is not None
        state = initial_state(params, optax.identity(), seed=0)
        return finished.evaluation(state, finished.frozen)

    def answers(self, start: Start, params: Any, tokens: int) -> list[dict[str, Any]]:
        """Greedy answers to the first ten questions.

        Args:
          start: the architecture and the tokenizer.
          params: of the model.
          tokens: largest number in an answer.
        """
        lines = Path(self.options.questions).read_text(encoding="utf-8").splitlines()[:10]
        questions = [json.loads(line)["turns"][0] for line in lines]
        model = LocalModel(
            as_model(start.config, params),
            start.tokenizer,
            identity=start.name,
            batch_size=len(questions),
            dtype=self.dtype,
            end_tokens=end_tokens(start.path, start.config.vocab_size),
        )
        replies = model.generate(questions, Decoding(max_tokens=tokens))
        return [
            {
                "question": question,
                "answer": reply.text,
                "tokens": reply.tokens,
                "finished": reply.finished,
            }
            for question, [reply] in zip(questions, replies, strict=True)
        ]

    def _loaded(
        self, kind: Kind, config: TrainConfig, start: Start, folder: Path, buckets: int
    ) -> Any:
        """The data of a stage, read once."""
        names = ("data", "eval_data", "max_length", "max_records", "max_eval_records")
        key = repr([kind.name, start.path, buckets, *(getattr(config, name) for name in names)])
        if key not in self._data:
            inputs = Inputs(config, start.tokenizer, folder, start.config, (0, 1))
            data: Any = kind.load(config, inputs)
            if self.is_gpu and isinstance(data, TokenizedData):
                own = {x.name: getattr(data, x.name) for x in dataclasses.fields(data)}
                data = FewLengths(**own, buckets=buckets)
            write_json(folder / "data.json", inputs.report)
            self._data[key] = data
        return self._data[key]

    def _compiled(
        self,
        config: TrainConfig,
        start: Start,
        stage: Stage,
        optimizer: optax.GradientTransformation,
        feed: Feed,
        state: TrainState,
    ) -> _Programs:
        """The programs of a config with a learning rate of 1, whatever its seed."""
        plain = dataclasses.replace(config, name="any", seed=0, output="any")
        key = f"{stage.name} {start.path} {to_json(plain)}"
        if key not in self._programs:

            def compiled(step: Step) -> Step:
                assert isinstance(step, functools.partial)
                own = {**step.keywords, "optimizer": optimizer}
                return compile_step(
                    functools.partial(step.func, *step.args, **own), state, self.mesh
                )

            others = (
                (stage.ledger_step, stage.ledger_every),
                (stage.probed_step, stage.probe_every),
            )
            self._programs[key] = _Programs(
                plain=compiled(stage.step),
                others=[(compiled(step), every) for step, every in others if step and every],
                evaluation=feed.evaluation,
            )
        return self._programs[key]


def with_unit_rate(config: TrainConfig, stage: str) -> tuple[Kind, TrainConfig, float]:
    """The kind of a stage, the config with a learning rate of 1 there, and its own rate."""
    kind = kind_of(config, stage)
    settings = kind.settings(config)
    rule = dataclasses.replace(settings.optimizer, learning_rate=1.0)
    unit = dataclasses.replace(config, **{stage: dataclasses.replace(settings, optimizer=rule)})
    return kind, unit, settings.optimizer.learning_rate


def _step_at(programs: _Programs, done: int) -> Step:
    """The compiled step of the next update."""
    return next((other for other, every in programs.others if done % every == 0), programs.plain)


def _no_other_model(field: str, folder: str) -> Any:
    raise ValueError(f"{field}: {folder}: short runs have one model")


def moved_tokens(path: Path) -> dict[str, Any]:
    """The eight tokens of each side that moved most over a run with a ledger, by pairs watched."""
    if not path.is_file():
        return {}
    sums: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for side, rows in entry["tokens"].items():
            tokens = sums.setdefault(entry["pairs_of"], {}).setdefault(side, {})
            for row in rows:
                known = tokens.setdefault(row["token"], dict.fromkeys(row, 0))
                for name, value in row.items():
                    known[name] = value if name == "token" else known[name] + value

    def change(row: Mapping[str, Any]) -> float:
        return abs(row["gradient"] + row["optimiser"] + row["curvature"])

    return {
        pairs_of: {
            side: sorted(tokens.values(), key=change, reverse=True)[:8]
            for side, tokens in sides.items()
        }
        for pairs_of, sides in sums.items()
    }
