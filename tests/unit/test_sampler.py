"""The schedules against diffusers', and what the spec refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hbxt_compress.errors import ArtifactError, SourceError, UsageError
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # noqa: E402

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def spec(**changes: object) -> SamplerSpec:
    values = {"solver": "unipc", "n_steps": 8, "shift": 3.0, "guidance": 4.0, **changes}
    return SamplerSpec(**values)


def from_config(config: dict, **changes: object) -> SamplerSpec:
    return SamplerSpec.from_diffusers(config, **{"n_steps": 8, "guidance": 4.0, **changes})


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 8, 30, 50, 999, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_schedule_equals_diffusers(solver, shift, n_steps):
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=shift)
    scheduler.set_timesteps(n_steps)
    ours = from_config(
        {**scheduler.config, "_class_name": type(scheduler).__name__}, n_steps=n_steps
    )
    assert ours.sigmas().dtype == ours.timesteps().dtype == np.float32
    np.testing.assert_array_equal(ours.sigmas(), scheduler.sigmas.numpy())
    np.testing.assert_array_equal(ours.timesteps(), scheduler.timesteps.float().numpy())


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_sigmas_fall_from_one_to_zero(solver):
    sigmas = spec(solver=solver, n_steps=20).sigmas()
    assert sigmas.shape == (21,)
    assert sigmas[0] == pytest.approx(1, abs=2e-6)
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_other_training_length_equals_diffusers():
    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=5.0, num_train_timesteps=500)
    scheduler.set_timesteps(6)
    ours = from_config({**scheduler.config, "_class_name": "UniPCMultistepScheduler"}, n_steps=6)
    np.testing.assert_array_equal(ours.timesteps(), scheduler.timesteps.float().numpy())


def test_json_round_trip():
    one = spec(guidance_2=3.0, boundary=0.875, disable_corrector=(0, 1), solver_order=3)
    assert SamplerSpec.from_json(json.loads(json.dumps(one.to_json()))) == one


KNOTS = ((100.0, 0.9, 0.05), (500.0, 1.1, -0.05), (900.0, 1.0, 0.0))


def test_corrections_survive_json():
    one = spec(corrections=KNOTS)
    assert SamplerSpec.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_spec_without_corrections_is_written_as_before():
    assert spec().corrections == ()
    assert json.dumps(spec(disable_corrector=(2,)).to_json()) == (
        '{"solver": "unipc", "n_steps": 8, "shift": 3.0, "guidance": 4.0, "guidance_2": null, '
        '"boundary": null, "n_train_timesteps": 1000, "solver_order": 2, "solver_type": "bh2", '
        '"disable_corrector": [2]}'
    )


def test_corrections_are_linear_between_and_constant_outside():
    one = spec(corrections=KNOTS)
    for timestep, a, b in KNOTS:
        assert one.correction_at(timestep) == (a, b)
    assert one.correction_at(0.0) == (0.9, 0.05)
    assert one.correction_at(999.0) == (1.0, 0.0)
    assert one.correction_at(300.0) == pytest.approx((1.0, 0.0))
    assert one.correction_at(800.0) == pytest.approx((1.025, -0.0125))
    assert spec().correction_at(500.0) == (1.0, 0.0)


def test_experts_do_not_share_corrections():
    two = spec(boundary=0.6, corrections=KNOTS)
    assert two.correction_at(600.0) == two.correction_at(899.0) == (1.0, 0.0)  # from 900 alone
    assert two.correction_at(599.0) == (1.1, -0.05)
    one_sided = spec(boundary=0.6, corrections=KNOTS[:2])
    assert one_sided.correction_at(700.0) == (1.0, 0.0)


def test_another_guidance_drops_the_corrections():
    one = spec(corrections=KNOTS)
    assert one.with_guidance(None) is one
    assert one.with_guidance(4.0) == one
    assert one.with_guidance(5.0).corrections == ()
    assert one.with_steps(3).corrections == KNOTS
    two = spec(corrections=KNOTS, boundary=0.6, guidance_2=3.0)
    assert two.with_guidance(4.0).corrections == ()


@pytest.mark.parametrize(
    ("corrections", "message"),
    [
        (((100.0, 1.0),), "three finite numbers"),
        (((100.0, float("nan"), 0.0),), "three finite numbers"),
        (((100.0, 1.0, float("inf")),), "three finite numbers"),
        (((100.0, True, 0.0),), "three finite numbers"),
        (((100.0, 0.49, 0.0),), r"a 0\.49: must lie in 0\.5\.\.2\.0"),
        (((100.0, 2.01, 0.0),), r"a 2\.01"),
        (((1001.0, 1.0, 0.0),), r"must rise within 0\.\.1000"),
        (((-1.0, 1.0, 0.0),), r"must rise within"),
        (((500.0, 1.0, 0.0), (500.0, 1.1, 0.0)), r"corrections\[1\] timestep 500\.0: must rise"),
        (((500.0, 1.0, 0.0), (400.0, 1.1, 0.0)), r"corrections\[1\] timestep 400\.0: must rise"),
    ],
)
def test_impossible_corrections_are_refused(corrections, message):
    with pytest.raises(UsageError, match=message):
        spec(corrections=corrections)
    document = {**spec().to_json(), "corrections": [list(one) for one in corrections]}
    with pytest.raises(ArtifactError, match="sampler is not readable"):
        SamplerSpec.from_json(document)


def test_json_with_unknown_and_missing_keys_names_them_all():
    document = {"solver": "unipc", "n_steps": 8, "sheft": 3.0}
    with pytest.raises(ArtifactError) as error:
        SamplerSpec.from_json(document)
    for part in ("sampler.sheft: unknown", "sampler.shift: missing", "sampler.guidance: missing"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"n_steps": "8"},
        {"n_steps": 0},
        {"disable_corrector": 3},
        {"corrections": 3},
        {"corrections": [3]},
        {"corrections": ["abc"]},
        {"corrections": [[100, 1, 10**400]]},
        {"corrections": None},
    ],
)
def test_json_with_bad_values_is_an_artifact_error(change):
    with pytest.raises(ArtifactError, match="sampler is not readable"):
        SamplerSpec.from_json({**spec().to_json(), **change})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 0}, "n_steps 0"),
        ({"shift": float("nan")}, "shift nan"),
        ({"shift": -1.0}, "shift -1.0"),
        ({"guidance": 0.5}, "guidance 0.5"),
        ({"guidance_2": 4.0}, "needs a boundary"),
        ({"boundary": 1.5}, "boundary 1.5"),
        ({"solver": "heun"}, "solver 'heun'"),
        ({"solver_order": 4}, "solver_order 4"),
        ({"solver_type": "bh3"}, "solver_type 'bh3'"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        spec(**changes)


def test_all_problems_come_at_once():
    with pytest.raises(UsageError, match=r"(?s)n_steps 0.*guidance 0.0"):
        spec(n_steps=0, guidance=0.0)


def test_experts_and_their_guidance():
    two = spec(boundary=0.9, guidance=4.0, guidance_2=3.0)
    assert not two.second_expert(900.0)  # the boundary itself is the first expert's
    assert two.second_expert(899.0)
    assert (two.guidance_at(900.0), two.guidance_at(899.0)) == (4.0, 3.0)
    assert two.with_guidance(2.0).guidance_at(899.0) == 2.0
    assert not spec().second_expert(1.0)
    assert spec().with_steps(None) == spec()
    assert spec().with_steps(3).n_steps == 3


def test_scheduler_of_another_class_is_named():
    with pytest.raises(SourceError, match="'DDIMScheduler' is not supported"):
        from_config({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, ("prediction_type: 'epsilon'", "use_flow_sigmas: False")),
        ({**FLOW, "use_karras_sigmas": True}, ("use_karras_sigmas",)),
        ({**FLOW, "lower_order_final": False}, ("lower_order_final",)),
        ({**FLOW, "thresholding": True, "predict_x0": False}, ("thresholding", "predict_x0")),
    ],
)
def test_unsupported_unipc_options_are_all_named(config, named):
    with pytest.raises(SourceError) as error:
        from_config({"_class_name": "UniPCMultistepScheduler", **config})
    assert all(option in str(error.value) for option in named)


def test_unsupported_euler_options_are_named():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    with pytest.raises(SourceError, match="use_dynamic_shifting"):
        from_config(config)


def test_wan_config_is_read():
    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=5.0, solver_order=2)
    config = {**scheduler.config, "_class_name": "UniPCMultistepScheduler"}
    ours = from_config(config, boundary=0.875, guidance_2=3.0)
    assert ours == spec(shift=5.0, boundary=0.875, guidance_2=3.0)


def test_bad_value_in_config_is_a_source_error():
    config = {"_class_name": "UniPCMultistepScheduler", **FLOW, "flow_shift": 0.0}
    with pytest.raises(SourceError, match=r"shift 0\.0"):
        from_config(config)


LEVELS = (1.0, 0.9375, 0.8333, 0.625)


def student(**changes: object) -> SamplerSpec:
    return spec(**{"solver": "renoise", "n_steps": 4, "levels": LEVELS, "guidance": 1.0, **changes})


def test_levels_of_a_students_own_are_its_schedule() -> None:
    own = student()
    np.testing.assert_array_equal(own.sigmas(), np.array([*LEVELS, 0], np.float32))
    np.testing.assert_allclose(own.timesteps(), [1000, 937.5, 833.3, 625])


def test_a_student_takes_no_other_number_of_steps() -> None:
    own = student()
    assert own.with_steps(None) is own.with_steps(4) is own
    with pytest.raises(UsageError, match=r"50 steps: this model denoises in 4.*leave"):
        own.with_steps(50)


def test_calibration_looks_at_all_steps_of_a_student_and_at_some_of_others() -> None:
    assert student().observed(20, (0, 7)) == (student(), (0, 1, 2, 3))
    assert spec().observed(20, (0, 7)) == (spec(n_steps=20), (0, 7))


def test_students_survive_json() -> None:
    rows = ((1.0, -0.1), (1.0, -0.1, 0.25))
    fitted = student(solver="fitted", n_steps=2, levels=(1.0, 0.5), coefficients=rows)
    for one in (student(), fitted):
        assert SamplerSpec.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert "levels" not in spec().to_json()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"levels": ()}, "needs the noise levels of its 4 steps"),
        ({"levels": LEVELS[:3]}, "must be 4 numbers that fall"),
        ({"levels": LEVELS[::-1]}, "must be 4 numbers that fall"),
        ({"levels": (1.0, 0.5, 0.5, 0.2)}, "must be 4 numbers that fall"),
        ({"levels": (1.0, 0.5, 0.2, 0.0)}, "must be 4 numbers that fall"),
        ({"levels": (1.2, 0.5, 0.2, 0.1)}, "must be 4 numbers that fall"),
        ({"levels": (1.0, 0.5, float("nan"), 0.1)}, "must be 4 numbers that fall"),
        ({"levels": ("1", 0.5, 0.2, 0.1)}, "must be 4 numbers that fall"),
        ({"solver": "unipc"}, "unipc cannot start at a level of 1"),
        ({"solver": "fitted"}, "coefficients: fitted has 0 rows"),
        ({"coefficients": ((1.0, 1.0),)}, "coefficients: renoise has 1 rows"),
        ({"solver": "fitted", "coefficients": ((1.0, 1.0),)}, r"4 rows of \[2, 3, 4, 5\] numbers"),
        (
            {
                "solver": "fitted",
                "n_steps": 1,
                "levels": (1.0,),
                "coefficients": ((1.0, np.inf),),
            },
            "must be finite",
        ),
        ({"solver": "heun"}, "must be one of euler, unipc, renoise, fitted"),
    ],
)
def test_students_that_cannot_run_are_refused(changes: dict, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        student(**changes)
