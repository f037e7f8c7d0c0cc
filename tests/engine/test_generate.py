"""Generation: batched answers are the answers one gets alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from families_zoo import small_config
from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.engine import generate, use_packed_attention
from tiny_models import save_base

PROMPTS = [[1, 40, 50], [1, 60], [1, 70, 80, 90, 100, 110, 120]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base"))
    loaded = load_backbone(resolve(flags={"base": str(base)}).config)
    use_packed_attention(loaded)
    return loaded


def test_a_batch_answers_as_each_prompt_alone(model):
    together = generate(model, PROMPTS, [2], max_new_tokens=12)
    alone = [generate(model, [prompt], [2], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(len(answer) == 12 or 2 not in answer for answer in together)


def test_greedy_is_the_argmax_of_the_models_own_logits(model):
    (answer,) = generate(model, [PROMPTS[0]], [2], max_new_tokens=4)
    from lorafit.engine import unpacked

    with unpacked(model), torch.no_grad():
        ids = list(PROMPTS[0])
        for token in answer:
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_the_stop_token_ends_an_answer_and_is_left_out(model):
    (free,) = generate(model, [PROMPTS[0]], [2], max_new_tokens=8)
    stop = free[3]
    (stopped,) = generate(model, [PROMPTS[0]], [stop], max_new_tokens=8)
    assert stopped == free[: free.index(stop)]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (
        generate(model, [PROMPTS[2]], [2], max_new_tokens=16, temperature=2.0, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_stream_gives_the_answer_token_by_token(model):
    seen = []
    (answer,) = generate(model, [PROMPTS[1]], [2], max_new_tokens=6, on_token=seen.append)
    assert seen[: len(answer)] == answer


def test_a_decoder_with_more_layers_than_its_encoder_answers():
    """As Blenderbot's 3 B has: 24 over 2; transformers' own cache has as many layers as the encoder."""
    config = small_config("blenderbot")
    config.encoder_layers = config.num_hidden_layers = 1
    assert config.decoder_layers > config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config).eval()
    [answer] = generate(model, [[5, 6, 7]], [1], max_new_tokens=3)
    assert len(answer) <= 3
