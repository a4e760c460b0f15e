import pytest
import torch
from safetensors.torch import save_file

from shardopt.errors import InputError
from shardopt.pretrain.model import ModelConfig, check_attention, initialise, meta_model, transformers_config


def test_no_two_random_weights_are_equal_and_the_seed_decides_them():
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers_config(ModelConfig(model_type="llama", **shape), 61, 0, 16)

    def weights(seed):
        model = meta_model(config)
        initialise(model, torch.device("cpu"), seed)
        return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}

    first, again, other = weights(3), weights(3), weights(4)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight, other[name])
        twins = [n for n, w in first.items() if n != name and w.flatten()[:512].equal(weight.flatten()[:512])]
        assert not twins, (name, twins)


def test_persistent_buffers_are_loaded_with_the_weights_or_missed_by_name(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    shape |= {"moe_intermediate_size": 16, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8}
    shape |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = transformers_config(ModelConfig(model_type="deepseek_v3", **shape), 61, 0, 16)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"

    def made(weights=None):
        model = meta_model(config)
        initialise(model, torch.device("cpu"), 0, weights)
        return model

    values = made().state_dict()
    values[name] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    save_file(values, tmp_path / "model.safetensors")
    assert made(str(tmp_path)).state_dict()[name].tolist() == [1.0, 2.0, 3.0, 4.0]
    del values[name]
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"no weights for {name}"):
        made(str(tmp_path))


SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_attention_is_computed_as_asked_and_gives_the_same():
    config, logits = ModelConfig(model_type="llama", **SMALL), []
    for attention in ("eager", "sdpa"):
        model = meta_model(transformers_config(config, 61, 0, 16), attention=attention)
        assert model.config._attn_implementation == attention
        initialise(model, torch.device("cpu"), 0)
        logits.append(model(input_ids=torch.arange(16)[None]).logits)
    torch.testing.assert_close(*logits)


def test_attention_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"model.attention: transformers knows no 'spda'; did you mean sdpa"):
        transformers_config(ModelConfig(model_type="llama", attention="spda", **SMALL), 61, 0, 16)
    with pytest.raises(InputError, match=r"model.attention: transformers cannot build this bloom with sdpa: "):
        meta_model(transformers_config(ModelConfig(model_type="bloom"), 61, 0, 16), attention="sdpa")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for attention in ("flex_attention", "flash_attention_2"):
        with pytest.raises(InputError, match=f"model.attention: {attention} does not train on the CPU"):
            check_attention(attention, cpu, "bf16")
        check_attention(attention, gpu, "bf16")
    with pytest.raises(InputError, match=r"does not compute in fp32; set engine.compute_dtype=bf16"):
        check_attention("flash_attention_2", gpu, "fp32")
    for attention in (None, "eager", "sdpa"):
        check_attention(attention, cpu, "fp32")
