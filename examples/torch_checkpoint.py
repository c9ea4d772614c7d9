"""A training state saved as torch.save does it, straight from where the tensors are, and loaded straight to there.

python examples/torch_checkpoint.py
"""

import os
import tempfile

import torch

import gpunvme.torch

device = "cuda" if torch.cuda.is_available() else "cpu"
model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(8, 1000, device=device)).sum().backward()
optimizer.step()

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "state.pt")
    gpunvme.torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)

    ours = gpunvme.torch.load(path)  # to the GPU that it came from, or map_location=
    theirs = torch.load(path, weights_only=True)
    weights = [key for key in theirs["model"] if torch.equal(ours["model"][key], theirs["model"][key])]
    print("equal, loaded by gpunvme and by PyTorch:", len(weights), "of", len(theirs["model"]), "tensors")
    model.load_state_dict(ours["model"])
    optimizer.load_state_dict(ours["optimizer"])

    # A table of features: each batch is one gather.
    table = torch.arange(100_000, dtype=torch.float32).reshape(1000, 100)
    with gpunvme.open(os.path.join(directory, "features"), "w") as file:
        gpunvme.torch.write_from_tensor(table, file)
        print("features: written by", file.explain().chosen)
    features = gpunvme.torch.FeatureTable(os.path.join(directory, "features"), 100, device=device)
    loader = torch.utils.data.DataLoader(features, 64, shuffle=True, collate_fn=features.collate)
    print("rows:", sum(len(batch) for batch in loader))
