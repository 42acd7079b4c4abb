"""What a denoiser is told, as tensors and back."""

import pytest
import torch

from mitune.conditioning import flatten, groups, stack, unflatten
from mitune.errors import MituneError, ModelError


def same(found, expected):
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and all(same(x, y) for x, y in zip(found, expected, strict=True))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


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
    flat = flatten(ARGUMENTS, 4, torch.tensor([2, 0]), shared=("img_ids",))
    assert all(len(value) == 2 for value in flat.values())
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
    assert same(unflatten(flat), expected)
    one = stack([{name: value[row] for name, value in flat.items()} for row in range(2)])
    assert same(unflatten(one), expected)


def test_rows_in_the_second_dimension():
    """As many layers as rows, too; without the name, they are refused where they can be seen."""
    states = torch.randn(4, 4, 3, 2)
    flat = flatten({"states": states, "text": torch.randn(4, 2)}, 4, torch.tensor([3, 1]), layered=("states",))
    assert same(flat["states^"], states.transpose(0, 1)[[3, 1]])
    assert same(unflatten(flat)["states"], states[:, [3, 1]])
    assert same(unflatten(stack([{"states^": row} for row in flat["states^"]]))["states"], states[:, [3, 1]])
    with pytest.raises(ModelError, match="takes states with the candidates in its second dimension"):
        flatten({"states": states[:3]}, 4, torch.tensor([3, 1]))


def test_a_list_with_one_text_a_row():
    texts = [torch.randn(length, 2) for length in (3, 1, 2, 4)]
    flat = flatten({"cap_feats": texts}, 4, torch.tensor([1, 3]), listed=True)
    assert flat["cap_feats[]"].shape == (2, 4, 2)
    assert same(unflatten(flat), {"cap_feats": [texts[1], texts[3]]})
    more = flatten({"cap_feats": texts}, 4, torch.tensor([0, 2]), listed=True)
    rows = [{name: value[row] for name, value in part.items()} for part in (flat, more) for row in range(2)]
    assert same(unflatten(stack(rows)), {"cap_feats": [texts[1], texts[3], texts[0], texts[2]]})


def test_texts_of_different_length():
    """They are padded in store, and handed on without padding, those of one length together; None stays None."""
    rows = [
        {"text": torch.randn(3, 2), "mask": torch.ones(3)},
        {"text": torch.randn(2, 2)},
        {"text": torch.randn(3, 2)},
    ]
    rows += [{"text": torch.randn(3, 2), "mask": torch.tensor([1.0, 1, 0])}]
    stacked = stack(rows)
    assert stacked["text"].shape == (4, 3, 2)
    seen = {}
    for index, arguments in groups(stacked):
        for place, row in enumerate(index.tolist()):
            seen[row] = {name: value[place] for name, value in arguments.items()}
    assert [same(seen[row], rows[row]) for row in range(4)] == [True] * 4
    assert len(list(groups(stacked))) == 3
    again = stack([{name: value[row] for name, value in stacked.items()} for row in range(4)])
    assert same(again, stacked)


def test_one_length_is_one_group():
    rows = [{"text": torch.randn(3, 2), "pooled": torch.randn(4)} for _ in range(3)]
    ((index, arguments),) = groups(stack(rows))
    assert index.tolist() == [0, 1, 2]
    assert same(arguments, {name: torch.stack([row[name] for row in rows]) for name in ("text", "pooled")})


def test_other_differences():
    with pytest.raises(MituneError, match="text differ in more than their length; make them with one setting"):
        stack([{"text": torch.randn(3, 2)}, {"text": torch.randn(3, 4)}])
    with pytest.raises(ModelError, match="list of tensors as residuals, which cannot be kept candidate by candidate"):
        flatten({"residuals": [torch.randn(4, 2)]}, 4, torch.arange(4))
