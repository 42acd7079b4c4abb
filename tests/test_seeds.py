"""Seeds of names and numbers, which every result rests on."""

from pathlib import Path

from mitune.denoiser.sampling import Request, candidate_seed, requests_of
from mitune.seeds import seed_of

SOURCE = Path(__file__).parent.parent / "src" / "mitune"


def test_seeds_stay_what_they_were():
    """The first eight bytes of SHA-256 of "0\\na red ball\\n3" and of "finetune\\n7\\n12", without the last bit."""
    assert candidate_seed(0, "a red ball", 3) == seed_of(0, "a red ball", 3) == 477328742980582188
    assert seed_of("finetune", 7, 12) == 3349905549970551953


def test_candidates_come_prompt_by_prompt():
    assert requests_of(["a", "b"], 2, 5) == [
        Request(prompt=p, seed=candidate_seed(5, p, j)) for p, j in (("a", 0), ("a", 1), ("b", 0), ("b", 1))
    ]


def test_each_part_and_its_place_count():
    seeds = {seed_of(*parts) for parts in ((0, "a", 1), (0, "a", 11), (1, "a", 0), ("a", 0, 1), (0, "a1"), (0, "a"))}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_they_are_made_in_one_place():
    files = [file for file in SOURCE.rglob("*.py") if "from_bytes(digest" in file.read_text(encoding="utf-8")]
    assert files == [SOURCE / "seeds.py"]
