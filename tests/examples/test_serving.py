"""The engine serves every request as it is alone, and would notice if it did not."""

import re

import numpy as np
import pytest
import serving
import serving_model


@pytest.mark.slow
def test_every_request_is_served_as_it_is_alone(capsys, tmp_path):
    path = tmp_path / "pool.png"
    assert serving.main(["-o", str(path)]) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"beside each alone (\S+)", text)[1]) < 1e-5
    accepted, proposed = re.search(r"drafts accepted +(\d+) of (\d+)", text).groups()
    assert 0 < int(accepted) < int(proposed)
    assert int(re.search(r"(\d+) were taken up from beginnings", text)[1]) > 0
    assert path.read_bytes().startswith(b"\x89PNG")


def forgets_the_mask(where):
    where["state_indices"] = where["output_state_indices"]


def keeps_a_draft(where):
    where["accepted"] = np.minimum(where["accepted"] + 1, np.diff(where["cu_seqlens"]))


def takes_another_slot(where):
    where["state_indices"] = np.roll(where["state_indices"], 1)
    where["output_state_indices"] = np.roll(where["state_indices"], -1)
    where["output_state_indices"][:] = -1


BUGS = {
    "a new request reads what is in its slot": ("chunk_delta_rule", forgets_the_mask),
    "a draft is kept that was not accepted": ("delta_rule_step", keeps_a_draft),
    "states of steps are not kept": ("delta_rule_step", takes_another_slot),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_wrong_call_is_noticed(capsys, monkeypatch, name):
    function, bug = BUGS[name]
    module = serving_model if function == "chunk_delta_rule" else serving
    right = getattr(module, function)

    def wrong(*args, **kwargs):
        bug(kwargs)
        return right(*args, **kwargs)

    monkeypatch.setattr(module, function, wrong)
    with np.errstate(invalid="ignore"):
        assert serving.main(["--requests", "6"]) == 1
    assert "was not served as it is alone" in capsys.readouterr().err
