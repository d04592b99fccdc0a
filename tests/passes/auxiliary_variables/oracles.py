"""The block methods in plain NumPy, written from their equations: samples in columns, biases [units, 1].

Where authors' code is public it was read beside the papers:
- bcd3: timlautk/BCD-for-DNNs-PyTorch, 14fcaa6, bcd_dnn_mlp_mnist.ipynb, cells 5 to 8: `updateV_js`,
  `updateWb_js`, `relu_prox` and "Training algorithm"; it sets b by the old W, which `old_weight` does.
- dladmm: xianggebenben/dlADMM, MLP/pytorch_version: main.py, cf0ef39, lines 98 to 120, and what it calls in
  build/lib/dlADMM/common.py, b965b95, lines 65 to 127. `update_W` and `update_a` double a step's weight while
  the energy lies above its majoriser, in a loop as here; ours computes the power of two. Their softmax
  divides by a sum that has 1e-10 added, ours does not. Where the cost keeps rising (main.py, lines 140 to
  145) the least weight of their steps goes on growing with rho at its cap, ours does not.
- admm (Taylor et al. 2016, algorithm 1): no code of the authors is public. Departures: biases, a proximal
  weight alpha where the paper takes pseudo-inverses, and a start by a forward pass in the place of noise.
- bcd2 (Zeng et al. 2019, algorithm 2): no code is public; the inner steps are ours.
"""

from __future__ import annotations

import numpy as np

LENGTHS = (0.0, 1.0, 0.5, 0.125)


def relu(u):
    return np.maximum(u, 0)


def least(energy, *tried):
    """Return the number of the lowest energy, entry by entry."""
    tried = np.stack(np.broadcast_arrays(*tried))
    return np.take_along_axis(tried, energy(tried).argmin(0)[None], 0)[0]


def relu_prox(a, b, g):
    """argmin of (max(u, 0) - a)^2 / 2 + g / 2 (u - b)^2, by trying both branches."""
    branches = (np.minimum(b, 0), np.maximum((a + g * b) / (1 + g), 0))
    return least(lambda u: (relu(u) - a) ** 2 + g * (u - b) ** 2, *branches)


def hinge_prox(y, c, w):
    """argmin of max(1 - z, 0) where y is 1, max(z, 0) elsewhere, + w / 2 (z - c)^2."""
    loss = lambda z: np.where(y > 0, relu(1 - z), relu(z))  # noqa: E731
    return least(lambda z: loss(z) + w / 2 * (z - c) ** 2, c, c + 1 / w, c - 1 / w, 0.0, 1.0)


class Net:
    """Weights, and the variables by one forward pass: U_1..U_N, V_0..V_N (ReLU below a linear output)."""

    def __init__(self, weights, biases, x, y):
        self.W, self.b, self.y, self.N = [None, *weights], [None, *biases], y, len(weights)
        self.begin(x)

    def begin(self, x):
        self.U, self.V = [None], [x]
        for i in range(1, self.N + 1):
            self.U.append(self.m(i))
            self.V.append(self.U[i] if i == self.N else relu(self.U[i]))

    def m(self, i):
        return self.W[i] @ self.V[i - 1] + self.b[i]

    def fit(self, i, target, rho, alpha, old_weight=False):
        W, v = self.W[i], self.V[i - 1]
        right = alpha * W + rho * (target - self.b[i]) @ v.T
        self.W[i] = right @ np.linalg.inv(alpha * np.eye(len(v)) + rho * v @ v.T)
        rest = target - (W if old_weight else self.W[i]) @ v
        self.b[i] = (alpha * self.b[i] + rho * rest.sum(1, keepdims=True)) / (rho * v.shape[1] + alpha)

    def fit_input(self, i, rho, gamma):
        """V_i."""
        W = self.W[i + 1]
        right = rho * W.T @ (self.U[i + 1] - self.b[i + 1]) + gamma * relu(self.U[i])
        self.V[i] = np.linalg.inv(rho * W.T @ W + gamma * np.eye(len(right))) @ right


def bcd3(net, gamma=1.0, rho=1.0, alpha=5.0, old_weight=False):
    for i in range(net.N, 0, -1):
        if i == net.N:
            net.V[i] = (net.y + gamma * net.U[i] + alpha * net.V[i]) / (1 + gamma + alpha)
            net.U[i] = (gamma * net.V[i] + rho * net.m(i)) / (gamma + rho)
        else:
            net.fit_input(i, rho, gamma)
            center = (rho * net.m(i) + alpha * net.U[i]) / (rho + alpha)
            net.U[i] = relu_prox(net.V[i], center, (rho + alpha) / gamma)
        net.fit(i, net.U[i], rho, alpha, old_weight)


class ADMM:
    """Sweeps, the multiplier, and how many sweeps there have been; beta = alpha = 1, gamma = 10."""

    def __init__(self, net, sweeps, warm):
        self.net, self.sweeps, self.warm = net, sweeps, warm
        self.multiplier, self.count = np.zeros_like(net.y), 0

    def step(self, beta=1.0, gamma=10.0, alpha=1.0):
        net = self.net
        for _ in range(self.sweeps):
            for i in range(1, net.N):
                net.fit(i, net.U[i], beta, alpha)
                net.fit_input(i, beta, gamma)
                net.U[i] = relu_prox(net.V[i], net.m(i), beta / gamma)
            net.fit(net.N, net.U[net.N], beta, alpha)
            m = net.m(net.N)
            net.U[net.N] = hinge_prox(net.y, m - self.multiplier / (2 * beta), 2 * beta)
            if self.count >= self.warm:
                self.multiplier = self.multiplier + beta * (net.U[net.N] - m)
            self.count += 1


def bcd2(net, gamma=1.0, alpha=5.0, steps=3):
    def shortened(point, ahead, energy, axis):
        """Move along a direction by the best of some lengths, for each column (0) or each row (1)."""
        energies = np.stack([energy(point + t * ahead).sum(axis) for t in LENGTHS])
        return point + np.expand_dims(np.array(LENGTHS)[energies.argmin(0)], axis) * ahead

    for i in range(net.N, 0, -1):
        if i == net.N:
            net.V[i] = (net.y + gamma * net.m(i) + alpha * net.V[i]) / (1 + gamma + alpha)
            net.fit(i, net.V[i], gamma, alpha)
            continue
        W, b, above = net.W[i + 1], net.b[i + 1], net.V[i + 1]
        f, d = (relu, lambda u: u > 0) if i + 1 < net.N else (lambda u: u, lambda u: 1.0)
        old, below = net.V[i], relu(net.m(i))
        metric = np.linalg.inv(gamma * W.T @ W + (gamma + alpha) * np.eye(len(old)))
        for _ in range(steps):
            v = net.V[i]
            u = W @ v + b
            slope = gamma * (W.T @ (d(u) * (f(u) - above)) + v - below) + alpha * (v - old)

            def energy(v, W=W, b=b, f=f, above=above, below=below, old=old):
                near = gamma * (v - below) ** 2 + alpha * (v - old) ** 2
                return np.concatenate([gamma * (f(W @ v + b) - above) ** 2, near])

            net.V[i] = shortened(v, -metric @ slope, energy, 0)
        x, target = net.V[i - 1], net.V[i]
        for held, inputs in ((net.W, x), (net.b, np.ones((1, x.shape[1])))):
            old, rest = held[i], net.m(i) - held[i] @ inputs
            metric = np.linalg.inv(gamma * inputs @ inputs.T + alpha * np.eye(len(inputs)))
            for _ in range(steps):
                u = held[i] @ inputs + rest
                slope = gamma * ((u > 0) * (relu(u) - target)) @ inputs.T + alpha * (held[i] - old)

                def energy(w, inputs=inputs, rest=rest, target=target, old=old):
                    fit = gamma * (relu(w @ inputs + rest) - target) ** 2
                    return np.concatenate([fit, alpha * (w - old) ** 2], axis=1)

                held[i] = shortened(held[i], -slope @ metric, energy, 1)


class DLADMM:
    """z, a and u of a network; `rho` constant."""

    def __init__(self, net, rho):
        self.net, self.rho = net, rho
        self.u = np.zeros_like(net.y)
        net.U[net.N] = np.where(net.y > 0, 1.0, -1.0)

    def aim(self, i):
        return self.net.U[i] + (self.u / self.rho if i == self.net.N else 0)

    def step(self):
        for i in range(self.net.N, 0, -1):
            self.z(i), self.b(i), self.W(i)
            if i > 1:
                self.a(i - 1)
        for i in range(1, self.net.N + 1):
            self.W(i), self.b(i), self.z(i)
            if i < self.net.N:
                self.a(i)
        self.u = self.u + self.rho * (self.net.U[self.net.N] - self.net.m(self.net.N))

    @staticmethod
    def descend(point, energy, slope):
        """A gradient step, its weight doubled from 1 while the energy lies above the quadratic majoriser."""
        weight = 1
        while True:
            ahead = -slope / weight
            bound = energy(point) + (slope * ahead).sum() + weight / 2 * (ahead**2).sum()
            if energy(point + ahead) <= bound:
                return point + ahead
            weight *= 2

    def W(self, i):
        n, aim = self.net, self.aim(i)
        slope = self.rho * (n.m(i) - aim) @ n.V[i - 1].T
        n.W[i] = self.descend(
            n.W[i], lambda w: self.rho / 2 * ((w @ n.V[i - 1] + n.b[i] - aim) ** 2).sum(), slope
        )

    def b(self, i):
        self.net.b[i] = self.net.b[i] - (self.net.m(i) - self.aim(i)).mean(1, keepdims=True)

    def a(self, i):
        n, aim = self.net, self.aim(i + 1)

        def energy(a):
            fit = ((n.W[i + 1] @ a + n.b[i + 1] - aim) ** 2).sum() + ((a - relu(n.U[i])) ** 2).sum()
            return self.rho / 2 * fit

        slope = self.rho * (n.W[i + 1].T @ (n.m(i + 1) - aim) + n.V[i] - relu(n.U[i]))
        n.V[i] = self.descend(n.V[i], energy, slope)

    def z(self, i):
        n = self.net
        if i < n.N:
            n.U[i] = relu_prox(n.V[i], n.m(i), 1.0)
            return
        center, z = n.m(i) - self.u / self.rho, n.U[i]
        value, t, zeta = 1e11, 1.0, z
        for _ in range(500):
            p = np.exp(z) / np.exp(z).sum(0)
            before, value = value, -(n.y * np.log(p)).sum() + self.rho / 2 * ((z - center) ** 2).sum()
            if abs(value - before) < 1e-3:
                break
            t, last = (1 + np.sqrt(1 + 4 * t * t)) / 2, t
            g = (1 - last) / t
            zeta, old = (self.rho * center + (z - 4 * (p - n.y)) / 4) / (self.rho + 1 / 4), zeta
            z = (1 - g) * zeta + g * old
        n.U[i] = z
