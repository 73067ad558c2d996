"""What a layer keeps between the tokens of a sequence, in the dictionary that all layers share."""


def states_of_layer(layer, inference_params, batch_size, initialize_states=False):
    """The layer's states of batch_size rows; new ones where there are none or the rows are others.

    initialize_states: fills those that are there as new ones would be.
    """
    assert layer.layer_idx is not None, "a cache needs layer_idx"
    cache = inference_params.key_value_memory_dict
    states = cache.get(layer.layer_idx)
    if states is None or states[0].shape[0] != batch_size:
        states = layer.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        cache[layer.layer_idx] = states
    elif initialize_states:
        fresh = layer.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        for state, value in zip(states, fresh, strict=True):
            state.copy_(value)
    return states
