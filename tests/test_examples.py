"""The job scripts: shell that parses, verbs and settings that exist."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.cli import VERBS

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_script_starts_its_verb_with_what_it_is_given(script, tmp_path):
    assert script.stem in VERBS
    # a program that says what it was called with, in place of ours; srun runs its command once
    for path, body in (
        (".venv/bin/layer61", 'echo "called $@"'),
        (".venv/bin/python", 'echo "called $@ as $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE"'),
        ("bin/srun", 'shift; exec "$@"'),
        ("bin/scontrol", 'printf "first\\nsecond\\n"'),
    ):
        program = tmp_path / path
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        program.chmod(0o755)
    jobs = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    jobs |= {"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    jobs |= {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    done = subprocess.run(
        ["bash", str(script), "my.toml", "run.dir=runs/a b"],
        cwd=tmp_path,
        env=os.environ | jobs | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert re.search(rf"called (-m pipeline )?{script.stem} my\.toml", said), said
    assert "run.dir=runs/a b" in said
    if script.stem == "dump":
        assert "dump.worker=2/3" in said
    if script.stem == "train":
        assert "as 9 of 16, 1 of 8" in said


def test_every_stage_has_a_script():
    assert {path.stem for path in SCRIPTS} == {"dump", "train", "export", "verify"}
