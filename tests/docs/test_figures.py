"""Every figure in the documentation is what the ``results.json`` says that it comes from."""

from __future__ import annotations

import pytest

from tests.docs.figures import WrongFigureError, check_page
from tests.docs.pages import PAGES, ROOT, name_of

# Figures that are no results, by page, each with the reason.
NOT_RESULTS = {
    "docs/certify.md": {
        "1e-9": "tests/certification/test_differences.py changes a gradient by so much",
        "eight times": "TIMES_ORDER of lightning_mics/certification/differences.py",
        "1e-3": "LEAST_EPS and LEAST_RATE of lightning_mics/certification/recorder.py",
    },
    "docs/checkpoints.md": {
        "1 GB": "size of the state that benchmarks/saving_time.py makes, its default",
        "256 MiB": "BLOCK_BYTES of lightning_mics/checkpoint/dcp/save_planner.py",
    },
    "docs/optimizers.md": dict.fromkeys(
        ("1e-06", "1e-04", "1e-02"), "tests/use/test_optimizers.py reads these tolerances from the table"
    ),
    "docs/options.md": {"10 minutes": "default timeout of NCCL's groups in torch"},
    "docs/survival.md": {
        "16 KB": "states of three random number generators, lightning_mics/checkpoint/random_states.py",
        "three seconds": "keep-alive of recipes/launch/torchrun.sh",
        "ten seconds": "silence_seconds of lightning_mics/in_memory/keeper/client.py",
        "0.1 s": "one observation in a discussion of what was not built",
    },
    "docs/planning.md": {
        "2 %": "tests/planning/rehearsal/test_rehearse.py compares every configuration, with this tolerance",
        "3 %": "tests/policy/test_step_memory.py compares with rehearsals, with this tolerance",
        "1.5 GB": "reserve of lightning_mics/policy/memory.py",
        "6 %": "reserve of lightning_mics/policy/memory.py",
    },
}


PEERS = "benchmarks/results/peers/results.json"


def page(claims: str, text: str) -> str:
    return f"# A page\n\n<!-- figures {PEERS}\n{claims}\n-->\n{text}\n\nAnother paragraph.\n"


FASTER = "6.1 times = 2x4.100.4.fsdp2-full.step_seconds / 2x4.100.4.mics-once-per-step@world.step_seconds"


ROW = "row FSDP2 in MB = 2x4.100.{}.fsdp2-full.sent_bytes"


TABLE = "| MB | s = 1 | s = 4 |\n|---|---|---|\n| **FSDP2** | 27.8 | 111 |"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_figures_of_the_page_are_those_of_their_results(path):
    exempt = NOT_RESULTS.get(name_of(path), {})
    text = path.read_text()
    check_page(text, exempt=frozenset(exempt))
    assert all(figure in text for figure in exempt)  # nothing is exempt that is gone


def test_figures_were_compared():
    assert check_page((ROOT / "README.md").read_text()) >= 15


def test_exemptions_have_a_page():
    assert set(NOT_RESULTS) <= set(map(name_of, PAGES))


def test_right_figures_pass_and_are_counted():
    assert check_page(page(FASTER, "A step takes 6.1 times less time.")) == 1
    assert check_page(page(ROW, TABLE)) == 2


@pytest.mark.parametrize(
    ("claims", "text", "message"),
    [
        (FASTER.replace("6.1", "3.9"), "A step takes 3.9 times less time.", "the page says 3.9, its source 6.09"),
        (FASTER, "A step takes 3.9 times less time.", "does not have the figure '6.1 times'"),
        (FASTER, "It takes 6.1 times less time, and 13 times fewer bytes.", "'13 times': no field"),
        (FASTER.replace("fsdp2-full", "fsdp3"), "It takes 6.1 times less time.", "has no field .* no 'fsdp3'"),
        (FASTER.split(" / ")[0].replace(".step_seconds", ""), "6.1 times", "is no number"),
        ("6.1 times: nothing", "It takes 6.1 times less time.", "is not FIGURE = FIELD"),
        (ROW, TABLE.replace("111", "112"), "FSDP2, column 4: the page says 112, its source 111"),
        (ROW, TABLE.replace("FSDP2", "FSDP3"), "has 0 rows 'FSDP2'"),
        (ROW, TABLE + "\n| DDP | 14.8 | 14.8 |", "'DDP': no field"),
    ],
)
def test_a_wrong_figure_fails(claims, text, message):
    with pytest.raises(WrongFigureError, match=message):
        check_page(page(claims, text))


@pytest.mark.parametrize(
    "text",
    [
        "A node sends 13 times fewer bytes.",
        "Twelve ranks took twelve seconds.",
        "It takes 8.5 GiB.",
        "Losses differ by 4.3e-6.",
        "38 % of the peak",
        "a 3x speedup",
        "1,540 GB",
        "| system | MB |\n|---|---|\n| DDP | 14.8 |",
    ],
)
def test_a_figure_without_a_source_fails(text):
    with pytest.raises(WrongFigureError, match=r"no field of a results\.json"):
        check_page(text)


@pytest.mark.parametrize(
    "text", ["torch 2.13.0 and 8 ranks", "[page](results/2x4.svg)", "```bash\nsleep 3 s\n```", "p3dn"]
)
def test_other_numbers_are_no_figures(text):
    assert check_page(text) == 0


def test_what_is_exempt_passes():
    assert check_page("about 3 % above", exempt=frozenset({"3 %"})) == 0
