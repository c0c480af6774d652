"""DALI's GPU pipeline without a GPU: its operators and arguments are what DALI's own schema takes, it reads what the
decoder feeds, its pictures are right when its decoder is the CPU's, and a buffer is given back after it was copied."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from albef_ds.data import dali_pipeline
from albef_ds.data.dali_pipeline import DaliDecoder, dali_available, define
from albef_ds.data.images import decode_image
from tests.data.damaged import encoded, photo
from tests.rehearsal import dali_graph

pytestmark = pytest.mark.skipif(
    not dali_available(), reason="NVIDIA DALI is not installed (pip install albef_ds[dali])"
)
GPU = torch.device("cuda", 1)
BATCH, SIZE = 3, 64
CROPS = [(0, 0, 200, 152), (13, 7, 101, 88), (64, 3, 64, 149)]


@pytest.fixture
def asked(monkeypatch):
    """What the decoder of a GPU asks `define` for: ({argument: value}, the stand-in that it got for a pipeline)."""
    told, pipeline = {}, Recorded()

    def stand_in(**arguments):
        told.update(arguments)
        return pipeline

    monkeypatch.setattr(dali_pipeline, "define", stand_in)
    DaliDecoder(BATCH, SIZE, GPU, threads=2, depth=2, hw_decoder_load=0.5).feed(
        [np.zeros(9, np.uint8)] * BATCH, CROPS, [True] * BATCH
    )
    return told, pipeline


class Recorded:
    """Takes a pipeline's place and keeps what it is fed with."""

    def __init__(self):
        self.fed = {}

    def build(self):
        pass

    def feed_input(self, name, data):
        self.fed[name] = data

    def schedule_run(self):
        pass


def graph_of(told) -> dict[str, dali_graph.Operator]:
    graph = dali_graph.read(define(**told | {"device_id": None}).serialize())
    return {operator.writes: operator for operator in graph}


# -- what DALI is asked to do ------------------------------------------------------------------------------------------


def test_a_gpus_decoder_asks_for_its_gpus_pipeline(asked):
    told, pipeline = asked
    assert told == dict(batch=BATCH, threads=2, depth=2, hw_decoder_load=0.5, device_id=1, decoder="mixed", size=SIZE)


def test_it_decodes_where_the_hardware_is_then_resizes_then_mirrors_on_the_gpu(asked):
    graph = graph_of(asked[0])
    [flip] = [operator for operator in graph.values() if operator.name == "Flip"]
    assert list(graph)[-1] == flip.writes and (flip.on, flip.arguments["device"]) == ("gpu", "gpu")
    assert flip.reads["horizontal"] == "mirror"
    resize = graph[flip.reads["0"]]
    assert resize.name == "Resize" and (resize.on, resize.arguments["device"]) == ("gpu", "gpu")
    assert resize.arguments["size"] == [SIZE, SIZE] and resize.arguments["antialias"] is True
    decode = graph[resize.reads["0"]]
    assert decode.name == "decoders__ImageSlice" and (decode.on, decode.arguments["device"]) == ("gpu", "mixed")
    assert decode.reads == {"0": "data", "start": "start", "shape": "shape"}
    told = {name: decode.arguments[name] for name in ("axis_names", "hw_decoder_load", "adjust_orientation")}
    assert told == {"axis_names": "WH", "hw_decoder_load": 0.5, "adjust_orientation": False}
    assert decode.arguments["jpeg_fancy_upsampling"] is True


def test_its_inputs_are_what_the_decoder_feeds(asked):
    told, pipeline = asked
    sources = {o.writes: o for o in graph_of(told).values() if o.name == "ExternalSource"}
    assert set(sources) == set(pipeline.fed) == {"data", "start", "shape", "mirror"}
    for name, fed in pipeline.fed.items():
        fed = fed if isinstance(fed, list) else [*fed]
        assert len(fed) == BATCH and {np.ndim(one) for one in fed} == {sources[name].arguments["ndim"]}, name
    assert np.array_equal(pipeline.fed["start"], [crop[:2] for crop in CROPS])
    assert np.array_equal(pipeline.fed["shape"], [crop[2:] for crop in CROPS])


def test_the_cpus_pipeline_ends_with_the_crop():
    graph = dali_graph.read(define(batch=BATCH, threads=1, depth=1).serialize())
    assert [operator.name for operator in graph if operator.name != "ExternalSource"] == ["decoders__ImageSlice"]
    assert graph[-1].arguments["device"] == "cpu" and {o.on for o in graph} == {"cpu"}


@pytest.mark.parametrize(
    "operator, wrong, told",
    [
        ("decoders.image_slice", {"hw_decoder_laod": 0.5}, (KeyError, '"hw_decoder_laod" is not defined')),
        ("decoders.image_slice", {"hw_decoder_load": "half"}, (ValueError, "could not convert string to float")),
        ("decoders.image_slice", {"hw_decoder_load": [0.5, 0.5]}, (TypeError, "float")),
        ("decoders.image_slice", {"device": "gpu"}, (RuntimeError, 'incompatible device "cpu"')),
        ("decoders.image_slice", {"device": "mixt"}, (ValueError, 'Unsupported device type: "mixt"')),
        ("resize", {"interpolation": 3}, (KeyError, '"interpolation" is not defined')),
        ("resize", {"device": "cpu"}, (RuntimeError, 'incompatible device "gpu"')),
        ("flip", {"mirror": 1}, (KeyError, '"mirror" is not defined')),
        ("flip", {"horizontal": "left"}, (ValueError, "invalid literal for int")),
    ],
)
def test_a_wrong_argument_is_refused_without_a_gpu(asked, monkeypatch, operator, wrong, told):
    from nvidia.dali import fn

    *outer, name = operator.split(".")
    module = getattr(fn, outer[0]) if outer else fn
    monkeypatch.setattr(module, name, functools.partial(_with, getattr(module, name), wrong))
    with pytest.raises(told[0], match=told[1]):
        define(**asked[0] | {"device_id": None}).serialize()


def _with(function, wrong, *inputs, **arguments):
    return function(*inputs, **arguments | wrong)


def test_an_unknown_operator_is_refused(asked, monkeypatch):
    from nvidia.dali import fn

    monkeypatch.delattr(fn.decoders, "image_slice")
    with pytest.raises(AttributeError, match="image_slice"):
        define(**asked[0] | {"device_id": None}).serialize()


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    """The decoder believes in its GPU; the pipeline decodes on the CPU and its images land there."""
    empty = torch.empty
    monkeypatch.setattr(
        dali_pipeline, "define", lambda **asked: define(**asked | {"device_id": None, "decoder": "cpu"})
    )
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **kind: empty(*shape, **kind))
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    return stream


def test_the_gpus_pipeline_with_the_cpus_decoder_gives_pillows_pictures(no_gpu):
    """The filter of DALI's own bicubic, which only a GPU uses, is Pillow's; crop and mirror are those asked for."""
    files = [encoded(photo(200, 152, seed), quality=90) for seed in range(BATCH)]
    mirror = [False, True, True]
    decoder = DaliDecoder(BATCH, SIZE, GPU, threads=1, depth=1)
    decoder.feed([np.frombuffer(data, np.uint8) for data in files], CROPS, mirror)
    got = decoder.result()
    assert got.shape == (BATCH, SIZE, SIZE, 3) and got.dtype == torch.uint8
    for data, (left, top, width, height), mirrored, found in zip(files, CROPS, mirror, got, strict=True):
        crop = decode_image(data).crop((left, top, left + width, top + height))
        expected = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else expected
        apart = np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int))
        assert apart.max() <= 3 and apart.mean() < 0.3


# -- the hand-over -----------------------------------------------------------------------------------------------------


class Stream:
    """A stream of a GPU as the host sees it: work is queued, and done when somebody waits for it."""

    cuda_stream = 1234  # the handle that DALI takes for it

    def __init__(self):
        self.queue, self.log = [], []

    def synchronize(self):
        self.log.append("wait")
        while self.queue:
            self.queue.pop(0)()


class Lent:
    """A pipeline that lends out one buffer, and writes its next batch into it as soon as it has it back: on the host's
    order, or on that of the stream that the outputs were bound to."""

    def __init__(self, log):
        self.log, self.buffer, self.bound = log, torch.full((BATCH, SIZE, SIZE, 3), 7, dtype=torch.uint8), None

    def build(self):
        pass

    def share_outputs(self, cuda_stream=None):
        self.log.append("share")
        self.bound = cuda_stream
        return [self]

    def __len__(self):
        return BATCH

    def as_tensor(self):
        return self.buffer

    def release_outputs(self):
        self.log.append("release")
        work = self.buffer.zero_
        self.bound.queue.append(work) if self.bound else work()


def test_a_buffer_goes_back_to_dali_after_its_copy_has_ended(no_gpu, monkeypatch):
    import nvidia.dali.plugin.pytorch as plugin

    stream = no_gpu

    def copy(lent, into, cuda_stream=None):
        stream.log.append("copy")
        work = functools.partial(into.copy_, lent)
        cuda_stream.queue.append(work) if cuda_stream else work()

    monkeypatch.setattr(plugin, "feed_ndarray", copy)
    monkeypatch.setattr(dali_pipeline, "define", lambda **_: Lent(stream.log))
    taken = DaliDecoder(BATCH, SIZE, GPU, threads=1, depth=1).result()
    assert stream.log.index("copy") < stream.log.index("release")
    stream.synchronize()
    assert (taken == 7).all(), f"DALI wrote its next batch before this one was copied: {stream.log}"
