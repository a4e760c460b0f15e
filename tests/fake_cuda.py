"""A GPU that is not there: tensors stay on the CPU, and the order of streams, events and the host is kept in clocks.

Inside `with FakeCuda() as gpu` tensors can be made on "cuda" and moved there; they say that they are, and compute at
once. What is recorded is when they could have been computed: each stream, and the host, has a vector clock (Lamport;
Fidge and Mattern), which a launch, an event, or a wait carries on to others. An access of memory that another stream
writes, with nothing that puts one before the other, raises Race, and so does memory that goes back to its stream while
another one may still use it; memory is one storage, so that two parts of it are not told apart. While `gpu.capturing`,
what a CUDA graph may not hold raises NotCapturable.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = "host"
CUDA = torch.device("cuda", 0)


class Race(AssertionError):
    """Two accesses of the same memory in no order."""


class NotCapturable(AssertionError):
    """A wait of the host, or pinned memory, within a captured step."""


class Stream:
    def __init__(self, device: Any = None, name: str | None = None) -> None:
        self.gpu = FakeCuda.now()
        self.gpu.streams += 1
        self.name = name or f"stream {self.gpu.streams}"

    def wait_event(self, event: Event) -> None:
        self.gpu.join(self.name, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.gpu.join(self.name, self.gpu.clocks[other.name])

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu.host_waits(self.gpu.clocks[self.name])


class Event:
    def __init__(self, **_: Any) -> None:
        self.clock: Counter[str] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        gpu = FakeCuda.now()
        self.clock = gpu.launch((stream or gpu.current).name)

    def synchronize(self) -> None:
        FakeCuda.now().host_waits(self.clock)


@dataclass
class Memory:
    """Of one storage: where it is, the stream it was allocated for, and its last accesses, by stream or host."""

    place: str  # "gpu", "pinned" or "host"
    owner: str
    ref: StorageWeakRef
    shape: tuple[int, ...]
    write: tuple[str, int] | None = None
    reads: dict[str, int] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    in_graph: bool = False  # a captured step reads or writes it
    pooled: bool = False  # allocated within the capture, for the graph alone


class FakeCuda(TorchFunctionMode):
    _now: FakeCuda | None = None

    def __init__(self) -> None:
        super().__init__()
        self.clocks: dict[str, Counter[str]] = {HOST: Counter()}
        self.memory: dict[int, Memory] = {}
        self.streams = 0
        self.capturing = False
        self.depth = 0
        self.place: str | None = None  # of what is made next; None: where what it is made of is

    @classmethod
    def now(cls) -> FakeCuda:
        assert cls._now is not None
        return cls._now

    # -- order ----------------------------------------------------------------------------------------------------

    def join(self, thread: str, other: Counter[str]) -> None:
        """What is in `other` comes before what `thread` does next."""
        self.clocks[thread] = self.clocks.setdefault(thread, Counter()) | other

    def launch(self, thread: str) -> Counter[str]:
        """A new moment of a stream, after all that the host has done, or of the host; the clock then."""
        if thread != HOST:
            self.join(thread, self.clocks[HOST])
        self.clocks[thread] = self.clocks[thread] + Counter({thread: 1})
        return self.clocks[thread]

    def host_waits(self, clock: Counter[str]) -> None:
        if self.capturing:
            raise NotCapturable("the host waits for the device")
        self.join(HOST, clock)

    def synchronize(self, *_: Any) -> None:
        for name in list(self.clocks):
            self.host_waits(self.clocks[name])

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    # -- memory ---------------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Memory:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            found = self.memory.get(storage._cdata)
            if found is None:  # made before, or as torch.tensor does it
                place = self.place or "host"
                found = self.add(tensor, place, self.current.name if place == "gpu" else HOST)
            return found

    def add(self, tensor: Tensor, place: str, owner: str) -> Memory:
        if place == "pinned" and self.capturing:
            raise NotCapturable("memory is pinned")
        with torch._C.DisableTorchFunction():
            ref, shape = StorageWeakRef(tensor.untyped_storage()), tuple(tensor.shape)
        self.memory[ref.cdata] = Memory(place, owner, ref, shape, pooled=self.capturing)
        return self.memory[ref.cdata]

    def access(self, thread: str, memory: Memory, writes: bool) -> None:
        """One, now: after the last write of others, a write also after their reads."""
        clock = self.clocks[thread]
        memory.in_graph |= self.capturing and thread != HOST
        if memory.in_graph and writes and thread == HOST:
            raise Race(f"{memory.place} {memory.shape}, which a graph reads, is written by the host")
        before = [] if memory.write is None else [("written", *memory.write)]
        before += [("read", *item) for item in memory.reads.items()] if writes else []
        for what, other, moment in before:
            if other != thread and clock[other] < moment:
                now = "written" if writes else "read"
                raise Race(f"{memory.place} {memory.shape}, {what} by {other}, is {now} by {thread} in no order")
        if writes:
            memory.write, memory.reads = (thread, clock[thread]), {}
        else:
            memory.reads[thread] = clock[thread]

    def sweep(self) -> None:
        """Take back memory that nothing refers to: what its stream does next may be given it."""
        for key, memory in list(self.memory.items()):
            if not memory.ref.expired():
                continue
            del self.memory[key]
            if memory.in_graph and not memory.pooled:
                raise Race(f"{memory.place} {memory.shape}, which a graph reads, is gone")
            if memory.place != "gpu":  # pinned memory is given out again only when copies are done
                continue
            clock = self.clocks.get(memory.owner, Counter()) | self.clocks[HOST]
            accesses = dict([memory.write] if memory.write else []) | memory.reads
            for other, moment in accesses.items():
                if other not in (memory.owner, *memory.recorded) and clock[other] < moment:
                    raise Race(f"gpu {memory.shape} is freed to {memory.owner} while {other} may still use it")

    def host_reads(self, tensor: Tensor) -> None:
        """The host looks at memory without torch."""
        self.launch(HOST)
        self.access(HOST, self.of(tensor), writes=False)

    # -- torch ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> FakeCuda:
        if self.depth == 0:
            FakeCuda._now = self
            self.current = self.default = Stream(name="default stream")
            self.patches = mock.patch.multiple(
                torch.cuda,
                Stream=Stream,
                Event=Event,
                stream=self.stream,
                current_stream=lambda *_: self.current,
                synchronize=self.synchronize,
                device=lambda *_: contextlib.nullcontext(),
                is_current_stream_capturing=lambda: self.capturing,
            )
            self.patches.start()
            self.methods = mock.patch.multiple(
                Tensor,
                create=True,
                # torch looks at the stream's type before it asks us
                record_stream=lambda tensor, stream: self.record(tensor, stream),
                register_post_accumulate_grad_hook=self.hooked(Tensor.register_post_accumulate_grad_hook),
            )
            self.methods.start()
            self.recorder = _Recorder(self)
            self.recorder.__enter__()
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if self.depth == 0:
            self.recorder.__exit__(*error)
            self.methods.stop()
            self.patches.stop()
            FakeCuda._now = None

    def hooked(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """Autograd calls some hooks without the mode that its caller has."""

        def inside(hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
            def run(param: Tensor) -> None:
                with contextlib.nullcontext() if self in _get_current_function_mode_stack() else self:
                    hook(param)

            return run

        return lambda tensor, hook: register(tensor, inside(hook))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ANSWERS:
            return _ANSWERS[func](self, *args, **kwargs)
        if func in _HOST_READS and self.of(args[0]).place == "gpu":
            self.host_waits(self.launch(self.current.name))
            self.host_reads(args[0])
        place = None
        if kwargs.get("device") is not None:
            place, kwargs["device"] = _place(kwargs["device"]), "cpu"
        if kwargs.pop("pin_memory", False):
            place = "pinned"
        return self.making(place, lambda: func(*args, **kwargs))

    def making(self, place: str | None, make: Callable[[], Any]) -> Any:
        before, self.place = self.place, place or self.place
        try:
            return make()
        finally:
            self.place = before

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        others = [a for a in args if not isinstance(a, torch.device | str)]
        device = next((a for a in args if isinstance(a, torch.device | str)), device)
        there, here = None if device is None else _place(device), self.of(tensor).place
        if there is None or (there == "gpu") == (here == "gpu"):
            return tensor.to(*others, **kwargs)
        waits = not (kwargs.pop("non_blocking", False) and "pinned" in (here, there))
        made = self.making(there, lambda: tensor.clone().to(*others, **kwargs))
        if waits:
            self.host_waits(self.clocks[self.current.name])
        return made

    def pin(self, tensor: Tensor) -> Tensor:
        self.of(tensor)
        return self.making("pinned", lambda: tensor.clone())

    def numpy(self, tensor: Tensor) -> Any:
        """The host may write what it is given so."""
        memory = self.of(tensor)
        if memory.place == "gpu":
            raise TypeError("can't convert a cuda tensor to numpy")
        self.launch(HOST)
        self.access(HOST, memory, writes=True)
        return tensor.numpy()

    def record(self, tensor: Tensor, stream: Stream) -> None:
        self.of(tensor).recorded.add(stream.name)


def _place(device: Any) -> str:
    return "gpu" if torch.device(device).type == "cuda" else "host"


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda gpu, t: CUDA if gpu.of(t).place == "gpu" else torch.device("cpu"),
    Tensor.is_cuda.__get__: lambda gpu, t: gpu.of(t).place == "gpu",
    Tensor.is_pinned: lambda gpu, t: gpu.of(t).place == "pinned",
    Tensor.to: FakeCuda.to,
    Tensor.cuda: lambda gpu, t, *_, **more: gpu.to(t, CUDA, **more),
    Tensor.cpu: lambda gpu, t: gpu.to(t, "cpu"),
    Tensor.pin_memory: FakeCuda.pin,
    Tensor.numpy: FakeCuda.numpy,
}
_HOST_READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, torch.equal}
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class _Recorder(TorchDispatchMode):
    """Notes what each operation reads and writes, on the current stream or on the host."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        gpu.sweep()
        given: list[tuple[Memory, bool]] = []
        for i, schema in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(schema.name)
            tensors = [gpu.of(t) for t in tree_leaves(value) if isinstance(t, Tensor)]
            if schema.alias_info is None or schema.alias_info.is_write:  # else it is only looked at in another shape
                given += [(memory, schema.alias_info is not None) for memory in tensors]
            elif tensors:
                given += [(tensors[0], False)] if func._schema.name == "aten::_local_scalar_dense" else []
        out = func(*args, **kwargs)
        touched = [memory for memory, _ in given]
        on_gpu = gpu.place == "gpu" or any(memory.place == "gpu" for memory in touched)
        thread = gpu.current.name if on_gpu else HOST
        gpu.launch(thread)
        for memory, writes in given:
            gpu.access(thread, memory, writes)
        known = {id(memory) for memory in touched}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in gpu.memory:
                inherited = "gpu" if any(memory.place == "gpu" for memory in touched) else "host"
                memory = gpu.add(tensor, gpu.place or inherited, thread)
                if func._schema.name.removeprefix("aten::") not in _EMPTY and id(memory) not in known:
                    gpu.access(thread, memory, writes=True)
        if func._schema.name == "aten::copy_" and {m.place for m in touched} in ({"gpu", "host"}, {"gpu", "pinned"}):
            waits = "host" in {m.place for m in touched} or not (len(args) > 2 and args[2])
            if waits:
                gpu.host_waits(gpu.clocks[thread])
        return out


class Work:
    """A collective on NCCL's stream, which keeps its tensors until somebody has waited for it."""

    def __init__(self, gpu: FakeCuda, *tensors: Tensor) -> None:
        self.gpu, self.tensors, self.clock = gpu, tensors, gpu.clocks["nccl"].copy()

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: Any = None) -> None:
        self.gpu.join(self.gpu.current.name, self.clock)
        if timeout is not None:
            self.gpu.host_waits(self.clock)
        self.tensors = ()


def collective(gpu: FakeCuda, action: Callable[[], Any], *tensors: Tensor) -> Work:
    """Run `action` on NCCL's stream, after all that the current one has to do."""
    gpu.join("nccl", gpu.launch(gpu.current.name))
    with gpu.stream(Stream(name="nccl")), torch.no_grad():
        action()
    return Work(gpu, *tensors)
