"""Adapters of PVeRA, the probabilistic VeRA of PEFT, as those of VeRA.

PVeRA (https://arxiv.org/abs/2512.07703) draws what lies between A and B from
normal distributions. The first half of A and of d gives their means, the
second the logarithms of their variances. Without sampling, as PEFT evaluates
and merges it, the first halves are a VeRA adapter.
"""


def as_vera_config(config):
    """Returns VeRA's config of the means, and how many halves A has."""
    if not isinstance(config, dict):
        return config
    if config.get("peft_type") != "PVERA":
        return {**config, "halves": 1}
    config = {name.replace("pvera", "vera"): x for name, x in config.items()}
    config["peft_type"] = "VERA"
    if config.get("bias") == "pvera_only":
        config["bias"] = "vera_only"
    return {**config, "halves": 2}


def as_vera_tensors(tensors, halves):
    """Returns the tensors of the means, by VeRA's names."""
    if halves == 1:
        return tensors
    renamed = {}
    for name, array in tensors.items():
        if name.endswith(("pvera_A", "pvera_lambda_d")):
            if len(array) % 2:
                raise ValueError(f"'{name}' has no halves: {array.shape}.")
            array = array[: len(array) // 2]
        renamed[name.replace("pvera_", "vera_")] = array
    return renamed
