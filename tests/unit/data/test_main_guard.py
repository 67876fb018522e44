"""A script that worker processes would run anew is told so at once."""

import sys
import types

import pytest

from resnet_jax.data.processes import check_main_guard, run_tasks
from resnet_jax.errors import UserError


def as_main(monkeypatch, **attributes):
    main = types.ModuleType("__main__")
    for name, value in attributes.items():
        setattr(main, name, value)
    monkeypatch.setitem(sys.modules, "__main__", main)


def test_a_script_without_a_guard_is_refused(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("from resnet_jax.training import train\ntrain(config)\n")
    as_main(monkeypatch, __file__=str(script))
    message = f'worker processes would run {script} anew: .* if __name__ == "__main__"'
    with pytest.raises(UserError, match=message):
        check_main_guard()
    with pytest.raises(UserError, match=message):
        list(run_tasks(print, [1, 2], workers=2, images=2))


@pytest.mark.parametrize("text", [None, "def main():\n    pass\n\nif __name__ == '__main__':\n    main()\n"])
def test_others_are_not(tmp_path, monkeypatch, text):
    if text is None:  # a notebook
        as_main(monkeypatch)
    else:
        (tmp_path / "script.py").write_text(text)
        as_main(monkeypatch, __file__=str(tmp_path / "script.py"))
    check_main_guard()
