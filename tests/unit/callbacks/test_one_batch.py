from callbacks.one_batch import OneBatch


def test_every_batch_becomes_the_first():
    callback = OneBatch()
    seen = []
    for index in range(3):
        batch = {"captions": [f"caption {index}"], "valid": index}
        callback.on_train_batch_start(None, None, batch, index)
        seen.append(batch)
    assert seen == [{"captions": ["caption 0"], "valid": 0}] * 3
