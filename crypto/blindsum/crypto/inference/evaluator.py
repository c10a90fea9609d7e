"""The cloud's side: evaluates the tail on a ciphertext, with evaluation keys only.

Everything is checked before SEAL loads it, and SEAL loads only objects composed here. Still, the arithmetic
runs in native code that a defect could bring down: run it in a worker process.
"""

import numpy as np
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.inference.circuit import (
    LARGEST_HIDDEN,
    LARGEST_INPUT,
    SQUARE,
    Floats,
    lay_out_output,
    lay_out_row,
    lay_out_rows,
)
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.crypto.inference.tail_wire import (
    key_tag_of,
    keys_digest,
    pack_answer,
    unpack_feature,
    unpack_keys,
)
from blindsum.crypto.primitives.derivation import Random, system_random
from blindsum.crypto.schemes.homomorphic.seal_wire import Native, SealContext


class EvaluationKeys:
    """A member's evaluation keys in SEAL's form, about 35 MB for the square circuit. They open nothing."""

    __slots__ = ("digest", "galois", "relinearisation", "tag")

    def __init__(self, digest: bytes, galois: Native, relinearisation: Native) -> None:
        self.digest = digest
        self.tag = key_tag_of(digest)
        self.galois = galois
        self.relinearisation = relinearisation


class TailEvaluator:
    """Evaluates one tail for any number of members. Raises `MissingExtra` without the extra `he`."""

    def __init__(self, model: TailModel, random: Random = system_random) -> None:
        self.model = model
        self._random = random
        circuit = self._circuit = model.circuit
        self._context = SealContext.create(circuit.ring, "ckks", 0)
        api, native = self._context.api, self._context.native
        self._encoder: Native = api.CKKSEncoder(native)
        self._evaluator: Native = api.Evaluator(native)
        levels = self._levels(native)
        scale, last = 2.0**circuit.scale_bits, 2.0**circuit.answer_scale_bits
        data = circuit.ring.data
        weights = np.zeros((LARGEST_HIDDEN, LARGEST_INPUT))
        rows, inputs = model.weights.shape
        weights[:rows, :inputs] = model.weights
        bias = np.zeros(LARGEST_HIDDEN)
        bias[:rows] = model.bias
        self._output: Native = None
        self._comes: Native = None
        # A plain factor scaled by the prime that rescaling divides by leaves the scale as it was.
        if circuit is SQUARE:
            stays, comes = lay_out_rows(weights, bias)
            factors = [
                self._encode(slots, levels[0], float(data[3])) for slots in (stays, comes) if slots.any()
            ]
            self._stays = factors[0]
            self._comes = factors[1] if len(factors) == 2 else None
            output = np.zeros(LARGEST_HIDDEN)
            output[:rows] = model.output * model.answer_scale
            squared = scale * scale / data[2]
            self._output = self._encode(lay_out_output(output), levels[2], last * data[1] / squared)
            self._bias = model.output_bias * model.answer_scale
        else:
            row = lay_out_row(weights[0] * model.answer_scale, bias[0] * model.answer_scale)
            self._stays = self._encode(row, levels[0], last * data[1] / scale)
            self._bias = 0.0

    @staticmethod
    def _levels(native: Native) -> list[list[int]]:
        """Names of the moduli from all data primes down to one."""
        found, data = [], native.first_context_data()
        while data is not None:
            found.append(data.parms_id())
            data = data.next_context_data()
        return found

    def _encode(self, slots: Floats, level: list[int], scale: float) -> Native:
        plaintext = self._context.api.Plaintext()
        self._encoder.encode(slots.tolist(), level, scale, plaintext)
        return plaintext

    def load_keys(self, data: bytes) -> EvaluationKeys:
        """A member's evaluation keys. Raises `Refused`."""
        circuit, api = self._circuit, self._context.api
        galois, relinearisation = {}, {}
        for used, key in zip(circuit.keys, unpack_keys(circuit, data), strict=True):
            if used.step:
                galois[(circuit.galois_element(used.step) - 1) // 2] = key
            else:
                relinearisation[0] = key
        try:
            load = self._context.load_switching_keys
            return EvaluationKeys(
                keys_digest(data),
                load(api.GaloisKeys(), galois),
                load(api.RelinKeys(), relinearisation) if relinearisation else None,
            )
        except (RuntimeError, ValueError) as error:
            raise Refused(RefusalReason.MALFORMED, "SEAL doesn't take the evaluation keys") from error

    def evaluate(self, keys: EvaluationKeys, frame: bytes) -> bytes:
        """The encrypted answer to an encrypted feature. Raises `Refused`."""
        circuit = self._circuit
        parts = unpack_feature(circuit, keys.tag, frame)
        try:
            ciphertext = self._context.load_ciphertext(parts, transformed=True, scale=2.0**circuit.scale_bits)
            answer = self._circuit_on(ciphertext, keys)
        except (RuntimeError, ValueError) as error:
            raise Refused(RefusalReason.MALFORMED, "SEAL can't compute on this ciphertext") from error
        return pack_answer(circuit, keys.tag, self._context.read_reduced(answer))

    def _circuit_on(self, feature: Native, keys: EvaluationKeys) -> Native:
        evaluator = self._evaluator
        total = self._product(feature, self._stays)
        if self._circuit is SQUARE:
            if self._comes is not None:
                moved = self._rotated(self._product(feature, self._comes), 64, keys)
                evaluator.add_inplace(total, moved)
            self._add_rotations(total, (32, 16, 8, 4, 2, 1), keys)
            evaluator.square_inplace(total)
            evaluator.relinearize_inplace(total, keys.relinearisation)
            evaluator.rescale_to_next_inplace(total)
            total = self._product(total, self._output)
            self._add_rotations(total, (2048, 1024, 512, 256, 128, 64), keys)
        else:
            self._add_rotations(total, (64, 32, 16, 8, 4, 2, 1), keys)
        evaluator.add_plain_inplace(total, self._hiding(total))
        return total

    def _product(self, ciphertext: Native, factor: Native) -> Native:
        product = self._context.api.Ciphertext()
        self._evaluator.multiply_plain(ciphertext, factor, product)
        self._evaluator.rescale_to_next_inplace(product)
        return product

    def _rotated(self, ciphertext: Native, step: int, keys: EvaluationKeys) -> Native:
        rotated = self._context.api.Ciphertext()
        element = self._circuit.galois_element(step)
        self._evaluator.apply_galois(ciphertext, element, keys.galois, rotated)
        return rotated

    def _add_rotations(self, total: Native, steps: tuple[int, ...], keys: EvaluationKeys) -> None:
        for step in steps:
            self._evaluator.add_inplace(total, self._rotated(total, step, keys))

    def _hiding(self, total: Native) -> Native:
        """The output bias for the first slot; fresh uniform numbers for all others, and all imaginary parts.

        Without them the other slots would tell the key holder partial sums of the weights.
        """
        circuit = self._circuit
        drawn = np.frombuffer(self._random(circuit.slots * 16), "<i8").astype(np.float64)
        slots = (drawn * 2.0 ** (circuit.mask_bits - 63)).view(np.complex128)
        slots[0] = complex(self._bias, slots[0].imag)
        plaintext = self._context.api.Plaintext()
        self._encoder.encode(slots.tolist(), total.parms_id(), total.scale, plaintext)
        return plaintext
