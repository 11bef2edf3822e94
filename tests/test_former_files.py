"""What former versions wrote is read, and computes what it computed; what scripts of theirs import is found."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import c3a_triton

# Saved by the version before the package had folders, with what the adapted model below gave for IDS.
FORMER = Path(__file__).parent / "data" / "former"
IDS = torch.tensor([[0, 3, 9], [1, 2, 7]])
# fmt: off
GAVE = [
    13.004533767700195, 10.41808032989502, 7.831625461578369, 5.24517297744751,
    2.9494810104370117, 2.604048252105713, 2.258615732192993, 1.9131830930709839,
    2.062993288040161, 9.020164489746094, 15.977339744567871, 22.934511184692383,
    9.757099151611328, 7.893859386444092, 6.030618190765381, 4.1673784255981445,
    6.363565921783447, 5.252834796905518, 4.142102241516113, 3.031370162963867,
    1.2077088356018066, 5.541103363037109, 9.874495506286621, 14.207886695861816,
]
# fmt: on


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.embed(ids)))))


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_of_a_former_version(merge: bool) -> None:
    model = c3a_triton.load_adapter(Model(), FORMER)
    if merge:
        model = model.c3a.merge_and_unload()
    torch.testing.assert_close(model(IDS).flatten(), torch.tensor(GAVE), rtol=1e-5, atol=1e-5)
    assert (model(IDS) - Model()(IDS)).abs().max() > 0.1


def test_what_scripts_import_by_a_former_path() -> None:
    from c3a_triton.commands import folder_merge as home
    from c3a_triton.folder_merge import merge_folder

    assert merge_folder is home.merge_folder
