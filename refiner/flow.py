"""The flow from noise to the residual of a decoded image: its training pairs, its loss and its integration.

Rectified flow (Liu et al., 2022, arXiv 2209.03003) with logit-normal times (Esser et al., 2024, arXiv 2403.03206,
section 3.1). The end of the flow is the residual, photograph - decoded image, in units of its root mean square at k.
A flow of the residual spends no time at noise levels at which the missing detail is not visible.
"""

import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import InputError, Refinement
from common.images import to_float, to_uint8
from common.randomness import normals
from common.runtime import check_can_compile, has_fast_bfloat16, move
from refiner.config import RefinerConfig
from refiner.model import Refiner

CFG_SCALE = 3.0  # lower distance and higher class accuracy than without guidance (docs/lab.md)
GUIDED_UNTIL = 0.5  # time; later guidance changes little and costs a pass (Kynkäänniemi et al., 2024, arXiv 2404.07724)
PIXELS_AT_ONCE = 2**17  # refined together: 32 images of 64 x 64


def scale_table(config: RefinerConfig) -> Tensor:
    """Scale of the residual at k = 1..C, interpolated linearly in log k: (C,) float32."""
    lengths = np.log(np.arange(1, config.num_channels + 1))
    table = np.interp(lengths, np.log(config.scale_lengths), config.scales)
    return torch.from_numpy(table).float()


def flow_loss(
    model: Callable[..., Tensor],
    images: Tensor,
    decoded: Tensor,
    num_tokens: Tensor,
    class_labels: Tensor,
    scales: Tensor,
    noise: Tensor,
    times: Tensor,
) -> Tensor:
    """Mean squared error of the velocity for each image: (b,) float32.

    `images` are photographs (b 3 H W) in [-1, 1], `decoded` the images decoded from their first num_tokens (b,) tokens,
    `noise` is standard normal of that shape, `times` (b,) are in [0, 1], `scales` are those of `scale_table` on the
    device. Labels (b,) are null_label where the class is dropped. `model` is a `Refiner`, possibly wrapped.
    """
    residual = (images - decoded) / scales[num_tokens - 1, None, None, None]
    point = torch.lerp(noise, residual, times[:, None, None, None])
    velocity = model(point, decoded, times, num_tokens, class_labels)
    return (velocity.float() - (residual - noise)).square().mean((1, 2, 3))


@torch.no_grad()
def integrate(
    refiner: Refiner,
    decoded: Tensor,
    num_tokens: Tensor,
    class_labels: Tensor,
    noise: Tensor,
    steps: int,
    cfg_scale: float,
    scales: Tensor,
) -> Tensor:
    """Integrate the flow in steps of equal length and add the residual to the decoded image: (b 3 H W) float32.

    Heun's method: a step of Euler and a correction; the last step has no correction, as in Karras et al. (2022, arXiv
    2206.00364, algorithm 1). Tensors are as in `flow_loss`; cfg_scale is classifier-free guidance before time
    GUIDED_UNTIL, where it costs a second pass, 1 = off.
    """
    null = torch.full_like(class_labels, refiner.config.null_label)
    both = torch.cat([decoded, decoded]), torch.cat([num_tokens, num_tokens]), torch.cat([class_labels, null])

    def velocity(point: Tensor, moment: float) -> Tensor:
        guided = cfg_scale != 1 and moment < GUIDED_UNTIL
        rows, lengths, labels = both if guided else (decoded, num_tokens, class_labels)
        points = torch.cat([point, point]) if guided else point
        found: Tensor = refiner(points, rows, point.new_full((len(rows),), moment), lengths, labels)
        if not guided:
            return found
        conditional, unconditional = found.chunk(2)
        return torch.lerp(unconditional, conditional, cfg_scale)

    point = noise
    for i in range(steps):
        moment, following = i / steps, (i + 1) / steps
        step = following - moment
        slope = velocity(point, moment)
        if i < steps - 1:
            slope = (slope + velocity(point + step * slope, following)) / 2
        point = point + step * slope
    return decoded + point * scales[num_tokens - 1, None, None, None]


class ImageRefiner:
    """Refine decoded images, with a copy of the network in the fastest layout and number format of its device.

    The noise of an image is a function of its seed, so an image at k = 64 is the image at k = 32 with more detail. A
    refined image depends on its seed, class, decoded image and k; other images of the batch change at most the rounding
    of sums.

    Weights and maps have `dtype`, by default bfloat16 where that runs in hardware, else float32; with `compile` the
    network is compiled at the first batch of each size.

    Raises:
        InputError: compile, without a C++ compiler.
    """

    def __init__(self, refiner: Refiner, *, dtype: torch.dtype | None = None, compile: bool = False):
        self.device, self.config = refiner.device, refiner.config
        if compile:
            check_can_compile(self.device)
        if dtype is None:
            dtype = torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32
        self.dtype = dtype
        self.refiner = copy.deepcopy(refiner).requires_grad_(False).eval()
        move(self.refiner, dtype=dtype).to(memory_format=torch.channels_last)
        if compile:
            self.refiner.compile()
        self.scales = scale_table(self.config).to(self.device)
        self._at_once = max(1, PIXELS_AT_ONCE // self.config.image_size**2)
        self._graphs: dict[tuple[int, Refinement], tuple[Any, list[Tensor], Tensor]] = {}
        self._seconds: dict[tuple[int, Refinement], float] = {}
        self._lock = threading.Lock()  # threads share the graphs and their inputs

    def refinement(self, refine: int | Refinement) -> Refinement:
        """Return settings; a number is that of steps, with the default guidance and temperature."""
        if isinstance(refine, Refinement):
            return refine
        scale = CFG_SCALE if self.config.has_null_label else 1.0
        return Refinement(refine, cfg_scale=scale, temperature=self.config.temperature)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        num_tokens: Sequence[int],
        class_labels: Sequence[int],
        seeds: Sequence[int],
        refinement: Refinement,
    ) -> Tensor:
        """Refine images (b 3 H W) uint8, decoded from k tokens each -> (b 3 H W) uint8, on the device.

        k is in [1, C], a label in [0, null_label], and a seed, of an image's noise, in [0, 2**63).

        Raises:
            InputError: guidance of a refiner trained without null label, or a seed out of range.
        """
        if refinement.cfg_scale != 1 and not self.config.has_null_label:
            raise InputError(
                f"refine_cfg_scale is {refinement.cfg_scale}, but this refiner was trained without null label; use 1"
            )
        inputs = [
            to_float(images.to(self.device)),
            torch.tensor(list(num_tokens), device=self.device),
            torch.tensor(list(class_labels), device=self.device),
            refinement.temperature * normals(seeds, *images.shape[1:]).to(self.device),
        ]
        parts = zip(*(tensor.split(self._at_once) for tensor in inputs), strict=True)
        return to_uint8(torch.cat([self._integrate(list(part), refinement) for part in parts]))

    def _integrate(self, inputs: list[Tensor], refinement: Refinement) -> Tensor:
        """Integrate a batch: directly, or on CUDA by a captured graph for each batch size."""
        if self.device.type != "cuda":
            return self._run(inputs, refinement)
        count = len(inputs[0])
        slots = min(1 << (count - 1).bit_length(), self._at_once)
        key = slots, refinement
        with self._lock:
            if key not in self._graphs:
                places = [torch.cat([tensor, tensor[:1].expand(slots - count, *tensor.shape[1:])]) for tensor in inputs]
                self._graphs[key] = self._captured(places, refinement)
            graph, places, result = self._graphs[key]
            for place, tensor in zip(places, inputs, strict=True):
                place[:count].copy_(tensor)
            graph.replay()
            return result[:count].clone()

    def _run(self, inputs: list[Tensor], refinement: Refinement) -> Tensor:
        decoded, num_tokens, class_labels, noise = inputs
        steps, scale = refinement.steps, refinement.cfg_scale
        return integrate(self.refiner, decoded, num_tokens, class_labels, noise, steps, scale, self.scales)

    def _captured(self, places: list[Tensor], refinement: Refinement) -> tuple[Any, list[Tensor], Tensor]:
        """Record an integration that reads `places` as a CUDA graph; returns the graph, `places` and its result."""
        side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(places, refinement)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._run(places, refinement)
        return graph, places, result

    def seconds(self, batch_size: int, refinement: Refinement) -> float:
        """Seconds that refining a batch of this size takes; measured once."""
        key = batch_size, refinement
        if key not in self._seconds:
            size, same = self.config.image_size, [1] * batch_size
            images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)
            rounds = []
            for _ in range(3):  # the first time may compile or capture
                begun = time.perf_counter()
                self(images, same, [0] * batch_size, same, refinement).cpu()
                rounds.append(time.perf_counter() - begun)
            self._seconds[key] = min(rounds)
        return self._seconds[key]
