"""The usual set-up to compare with: LitServe, batches of up to 16 requests, diffusers' DDIM.

    .venv/bin/python benchmarks/peer.py DIFFUSERS_FOLDER PORT DTYPE

POST /predict {"steps", "class_label", "seed"} answers with a PNG in base64. Requests of a batch
with equal steps run together, as the pipeline allows; others one group after another.
"""

# No `from __future__ import annotations`: LitServe reads the types of decode_request itself.
import base64
import io
import sys
from collections import defaultdict
from typing import Any

import litserve
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image


class Sampler(litserve.LitAPI):
    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__(max_batch_size=16, batch_timeout=0.05)
        self.folder, self.dtype = folder, getattr(torch, dtype)

    def setup(self, device: str) -> None:
        network = UNet2DModel.from_pretrained(self.folder, subfolder="unet")
        self.network = network.to(device, self.dtype).eval()
        self.scheduler = DDIMScheduler.from_pretrained(self.folder, subfolder="scheduler")

    def decode_request(self, request: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return request

    @torch.inference_mode()
    def predict(self, batch: list[dict[str, Any]], **kwargs: Any) -> list[torch.Tensor]:
        groups: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(batch):
            groups[request["steps"]].append(i)
        out: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        for steps, members in groups.items():
            labels = torch.tensor([batch[i]["class_label"] for i in members])
            x = torch.stack([self.noise(batch[i]["seed"]) for i in members])
            self.scheduler.set_timesteps(steps)
            for t in self.scheduler.timesteps:
                eps = self.network(x.to(self.dtype), t, class_labels=labels).sample.float()
                x = self.scheduler.step(eps, t, x).prev_sample
            for i, image in zip(members, x, strict=True):
                out[i] = image
        return out

    def noise(self, seed: int) -> torch.Tensor:
        size = self.network.config.sample_size
        channels = self.network.config.in_channels
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(channels, size, size, generator=generator)

    def encode_response(self, image: torch.Tensor, **kwargs: Any) -> dict[str, str]:
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
        return {"png": base64.b64encode(file.getvalue()).decode()}


if __name__ == "__main__":
    folder, port, dtype = sys.argv[1:]
    server = litserve.LitServer(Sampler(folder, dtype), accelerator="cpu", timeout=600)
    server.run(port=int(port), generate_client_file=False, log_level="warning")
