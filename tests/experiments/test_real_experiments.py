"""The bench of the pretrained model and its experiment, on the bundled model: topics are shared
out without overlap, cases are named apart, and inputs are rounded as a case says.
"""

from __future__ import annotations

import numpy as np

from refllm import load
from refllm.experiments import real_activations as experiment
from refllm.experiments.real_bench import topics
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.quant.recipe import quantize_model
from refllm.quant.rotation import RotatedLinear, rotate

MODEL = load("stdlib-draft")


def test_the_halves_of_the_topics_are_disjoint_and_are_all_of_them():
    from pydoc_data.topics import topics as texts

    calibration, evaluation = ({document.name for document in topics(part)} for part in (0, 1))
    assert not calibration & evaluation
    assert calibration | evaluation == {f"topics/{name}" for name in texts}


def test_cases_have_names_of_their_own():
    names = [case.name for case in experiment.cases()]
    assert len(names) == len(set(names))


def test_rounded_inputs_stay_behind_the_rotation_and_fewer_bits_cost_more():
    rotated = rotate(MODEL)
    made, _ = quantize_model(rotated, "rtn", Scheme(8, "restricted", "channel"))
    ids = [5, 9, 2, 7]
    errors = []
    for bits in (8, 4):
        model = experiment.quantize_inputs(made, bits)
        for layer in model.weights["layers"]:
            assert isinstance(layer["down_proj"], RotatedLinear)
            assert isinstance(layer["down_proj"].weight, W8A8Linear)
            assert isinstance(layer["q_proj"], W8A8Linear)
        errors.append(np.abs(model.logits(ids) - MODEL.logits(ids)).mean())
    assert 0 < errors[0] < errors[1]


def test_the_share_in_float_falls_with_the_threshold():
    shares = []
    for threshold in (0.5, 4.0, 1e9):
        model, _ = quantize_model(
            MODEL, "int8", Scheme(8, "restricted", "channel"), threshold=threshold
        )
        model.logits([5, 9, 2, 7])
        shares.append(experiment.share_in_float(model.weights))
    assert 1 >= shares[0] > shares[1] >= shares[2] == 0


def test_full_precision_is_shared_by_cases_and_is_rotated_once():
    class Bench:
        model = MODEL

    made = experiment.Experiment(Bench())
    assert made.base(experiment.Case()) is MODEL
    rotated = made.base(experiment.Case(rotated=True))
    assert rotated is made.base(experiment.Case(4, rotated=True))
    np.testing.assert_allclose(rotated.logits([5, 9]), MODEL.logits([5, 9]), atol=1e-3)
