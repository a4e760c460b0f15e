import torch

from shardopt.pretrain.model import ModelConfig, initialise, meta_model, transformers_config


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
