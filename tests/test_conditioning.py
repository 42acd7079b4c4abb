"""What a denoiser is told, row by row, as its arguments again, and in a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mitune.denoiser.conditioning import Conditioning, Passes, Shared, stack
from mitune.errors import MituneError, ModelError


def same(one, other):
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, (list, tuple)):
        return type(one) is type(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def only(conditioning):
    """The arguments of a conditioning for which one call will do."""
    ((rows, arguments),) = conditioning.arguments()
    assert rows.tolist() == list(range(len(conditioning)))
    return arguments


def of(rows, **arguments):
    return Conditioning.of_call(arguments, rows, torch.arange(rows))


def singly(conditioning):
    return [conditioning.take([row]) for row in range(len(conditioning))]


ARGUMENTS = {
    "encoder_hidden_states": torch.randn(4, 3, 2),
    "added_cond_kwargs": {"text_embeds": torch.randn(4, 5), "scale": torch.tensor(2.0), "size": 3},
    "cross_attention_kwargs": {"scale": 0.5, "inner": {"names": ["a", "b"]}},
    "img_ids": torch.randn(4, 3),  # as many places as rows, but the same for all
    "image_rotary_emb": (torch.randn(6, 2), torch.randn(6, 2)),
    "img_shapes": [[[1, 2, 2]]],
    "height": 16,
    "mask": None,
    "return_dict": False,
}


def test_there_and_back():
    """The rows that are picked, and the rest as it was."""
    picked = Conditioning.of_call(ARGUMENTS, 4, torch.tensor([2, 0]), shared=("img_ids",))
    assert len(picked) == 2
    expected = {
        "encoder_hidden_states": ARGUMENTS["encoder_hidden_states"][[2, 0]],
        "added_cond_kwargs": {
            "text_embeds": ARGUMENTS["added_cond_kwargs"]["text_embeds"][[2, 0]],
            "scale": torch.tensor(2.0),
            "size": 3,
        },
        **{
            name: ARGUMENTS[name]
            for name in ("img_ids", "image_rotary_emb", "img_shapes", "height", "cross_attention_kwargs")
        },
    }
    assert same(only(picked), expected)
    assert same(only(stack(singly(picked))), expected)
    assert same(only(Conditioning.from_tensors(picked.to_tensors())), expected)


def test_what_a_plain_model_is_told_has_its_own_name_in_a_file():
    states = torch.randn(2, 3, 2)
    assert same(of(2, encoder_hidden_states=states, mask=None).to_tensors(), {"encoder_hidden_states": states})


def test_a_file_has_both_passes(tmp_path):
    """Whatever the form of the arguments; what both passes share, too."""
    shared = torch.randn(6, 3)
    texts = [torch.randn(length, 2) for length in (3, 1)]
    passes = Passes(
        stack([of(2, text=torch.randn(2, 3, 4), ids=shared), of(1, text=torch.randn(1, 2, 4), ids=shared, kind="b")]),
        Conditioning.of_call({"feats": texts, "ids": shared}, 2, torch.arange(2), listed=True),
    )
    save_file(passes.to_tensors(), tmp_path / "file")
    again = Passes.from_tensors(load_file(tmp_path / "file"))
    for one, other in ((again.conditional, passes.conditional), (again.null, passes.null)):
        both = [list(each.arguments()) for each in (one, other)]
        assert len(both[1]) == (2 if other is passes.conditional else 1)
        assert all(same(x, y) for x, y in zip(*both, strict=True))


def test_another_file_is_refused():
    with pytest.raises(ValueError, match="has names that this version of mitune does not know"):
        Conditioning.from_tensors({"text": torch.randn(2, 3), "img_ids=": torch.randn(2, 3)})


def test_rows_in_the_second_dimension():
    """As many layers as rows, too; without the name, they are refused where they can be seen."""
    states, picked = torch.randn(4, 4, 3, 2), torch.tensor([3, 1])
    told = Conditioning.of_call({"states": states, "text": torch.randn(4, 2)}, 4, picked, layered=("states",))
    assert same(told.rows["states"], states.transpose(0, 1)[[3, 1]])
    for again in (told, stack(singly(told)), Conditioning.from_tensors(told.to_tensors())):
        assert same(only(again)["states"], states[:, [3, 1]])
    with pytest.raises(ModelError, match="takes states with the candidates in its second dimension"):
        of(4, states=states[:3])


def test_a_list_with_one_text_a_row():
    texts = [torch.randn(length, 2) for length in (3, 1, 2, 4)]
    first, second = (
        Conditioning.of_call({"cap_feats": texts}, 4, torch.tensor(rows), listed=True) for rows in ([1, 3], [0, 2])
    )
    assert first.rows["cap_feats"].shape == (2, 4, 2)
    assert same(only(first), {"cap_feats": [texts[1], texts[3]]})
    parts = singly(first) + singly(second)
    assert same(only(stack(parts)), {"cap_feats": [texts[1], texts[3], texts[0], texts[2]]})


def test_texts_of_different_length():
    """They are padded in store, and handed on without padding, those of one length together; None stays None."""
    told = [
        {"text": torch.randn(1, 3, 2), "mask": torch.ones(1, 3)},
        {"text": torch.randn(1, 2, 2)},
        {"text": torch.randn(1, 3, 2)},
        {"text": torch.randn(1, 3, 2), "mask": torch.tensor([[1.0, 1, 0]])},
    ]
    stacked = stack([of(1, **arguments) for arguments in told])
    assert stacked.rows["text"].shape == (4, 3, 2)
    for again in (stacked, stack(singly(stacked)), Conditioning.from_tensors(stacked.to_tensors())):
        calls = list(again.arguments())
        assert len(calls) == 3
        by_row = {
            row: {name: value[[place]] for name, value in arguments.items()}
            for rows, arguments in calls
            for place, row in enumerate(rows.tolist())
        }
        assert [same(by_row[row], told[row]) for row in range(4)] == [True] * 4


def test_one_length_is_one_call():
    rows = [{"text": torch.randn(1, 3, 2), "pooled": torch.randn(1, 4)} for _ in range(3)]
    arguments = only(stack([of(1, **row) for row in rows]))
    assert same(arguments, {name: torch.cat([row[name] for row in rows]) for name in ("text", "pooled")})


def test_what_is_shared_by_some_rows_is_told_them_alone():
    """The same length, but other positions or another setting: calls of their own."""
    first, second = of(2, text=torch.zeros(2, 3), ids=torch.zeros(5)), of(1, text=torch.ones(1, 3), ids=torch.ones(5))
    third = of(1, text=torch.ones(1, 3), ids=torch.ones(5), size=4)
    stacked = stack([first, second, third, second])
    calls = [(rows.tolist(), arguments["ids"][0].item()) for rows, arguments in stacked.arguments()]
    assert calls == [([0, 1], 0.0), ([2, 4], 1.0), ([3], 1.0)]


def test_rows_in_another_precision():
    """What rows share keeps the precision that the pipeline chose."""
    told = of(2, text=torch.randn(2, 3), ids=torch.randn(5), tokens=torch.tensor([1, 2])).to("cpu", torch.bfloat16)
    dtypes = {name: value.dtype for name, value in only(told).items()}
    assert dtypes == {"text": torch.bfloat16, "ids": torch.float32, "tokens": torch.int64}


def test_shared_tensors_differ_by_their_values():
    one, other = Shared({"ids": torch.zeros(2)}), Shared({"ids": torch.ones(2)})
    assert one.same_as(Shared({"ids": torch.zeros(2)}))
    assert not one.same_as(other) and not one.same_as(Shared({"ids": torch.zeros(2)}, {"size": 1}))


def test_other_differences():
    with pytest.raises(MituneError, match="text differ in more than their length; make them with one setting"):
        stack([of(1, text=torch.randn(1, 3, 2)), of(1, text=torch.randn(1, 3, 4))])
    with pytest.raises(ModelError, match="list of tensors as residuals, which cannot be kept candidate by candidate"):
        of(4, residuals=[torch.randn(4, 2)])
