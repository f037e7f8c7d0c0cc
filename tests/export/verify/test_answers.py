"""LiveAnswers: what an export answers is counted exactly, and no more of it is decoded than the count needs."""

import pytest
import torch

from lorafit.data import TextTokenizer
from lorafit.demo import BASE
from lorafit.export.verify.answers import LiveAnswers, _begins

STOP, MOST = 0, 24


class Template:
    """What LiveAnswers needs of one."""

    tokenizer, stop_ids = TextTokenizer.from_base(str(BASE)), (STOP,)


class Script:
    """A model in a program that answers `said` and counts its forward passes."""

    def __init__(self, prompt, said):
        self.ids, self.passes = [*prompt, *said], 0

    def log_probabilities(self, row):
        self.passes += 1
        places = row.predicting + 1
        return torch.nn.functional.one_hot(
            torch.tensor([self.ids[place] if place < len(self.ids) else STOP for place in places]), 8192
        ).log()


def ids_of(text):
    return [*Template.tokenizer.encode(text), STOP]


@pytest.mark.parametrize(
    ("live", "said", "right", "passes"),
    [
        ("billing", "billing", True, 1),
        ("shipping desk", "billing and returns: an answer that goes on and on and on", False, 6),
        ("bill", "billing", True, 5),
        ("billing desk", "billing", True, 1),
        ("the other way round", "bi\u0142\u0142ing", False, 5),
    ],
)
def test_an_answer_is_decoded_from_where_it_differs_and_while_it_may_be_right(live, said, right, passes):
    prompt = Template.tokenizer.encode("Route this ticket to a queue.")
    given = LiveAnswers((prompt,), ("billing",), (ids_of(live),), Template(), MOST)
    served = Script(prompt, ids_of(said))
    found = given.compare(served)
    assert (found.equal, found.right) == (live == said, right)
    assert served.passes <= passes


@pytest.mark.parametrize(
    "text", ["bi\u0142\u0142ing, isn't it? a \U0001f600 b", "two  spaces\n\tand a line", "{'a': 1}", "x"]
)
def test_every_beginning_of_a_response_may_become_it(text):
    ids = Template.tokenizer.encode(text)
    assert all(_begins(Template.tokenizer.decode(ids[:end]).strip(), text) for end in range(len(ids) + 1))
