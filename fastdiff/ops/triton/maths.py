# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Philox, Box-Muller, the exponential and SiLU on values: csrc/noise.h and csrc/number.h, operation by operation.

The constants are the float32 numbers written there in hexadecimal; every digit counts. No function loads or stores.
Multiplication and addition round separately (kernels are compiled without fusion) unless ``fma`` says otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011) on uint32: a wider counter would silently be another generator."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high2, low2 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def root(a, rest):
    """sqrt(a + rest), a normal: Halley's step from an estimate of the inverse root, and Newton's on the root."""
    guess = (0x5F375A86 - (a.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    estimate = a * guess
    off = tl.fma(-estimate, guess, 1.0)
    step = off * tl.fma(off, 0.375, 0.5)
    r, inverse = tl.fma(estimate, step, estimate), tl.fma(guess, step, guess)
    lacking = 0.5 * inverse * (tl.fma(-r, r, a) + rest)
    most = r + lacking
    return most, (r - most) + lacking


@triton.jit
def radius(word):
    """sqrt(-2 log u) for u = (2k + 1) 2^-25, k the upper 24 bits of the word, as a number and a much smaller one."""
    n = (word >> 8).to(tl.int32) * 2 + 1
    # u = 2^(e - 25) (1 + f) with 1 + f in about [2/3, 4/3); n - 2^e and f are exact.
    e = (n.to(tl.float32).to(tl.int32, bitcast=True) - 0x3F2AAAAB) >> 23
    f = (n - (1 << e)).to(tl.float32) * ((127 - e) << 23).to(tl.float32, bitcast=True)
    # log(1 + f) = f + f^2 (f P(f) - 1/2), P minimax on [-1/3, 1/3] to 5e-9 of the logarithm.
    p = tl.fma(f, -0.13192495703697205, 0.13963064551353455)
    p = tl.fma(p, f, -0.12114936858415604)
    p = tl.fma(p, f, 0.14010809361934662)
    p = tl.fma(p, f, -0.16685478389263153)
    p = tl.fma(p, f, 0.20010049641132355)
    p = tl.fma(p, f, -0.24999688565731049)
    p = tl.fma(p, f, 0.33333224058151245)
    bend = f * f * tl.fma(p, f, -0.5)
    log1p = f + bend
    # The logarithm is log + rest: k log 2, in two parts, and log1p, each sum with what it rounds away.
    k = (e - 25).to(tl.float32)
    log = tl.fma(k, 0.6931471824645996, log1p)
    rest = (tl.fma(k, 0.6931471824645996, -log) + log1p) + tl.fma(k, -1.9046542121259336e-09, (f - log1p) + bend)
    return root(-2.0 * log, -2.0 * rest)


@triton.jit
def rotate(most, rest, word):
    """r cos and r sin of 2 pi word / 2^32 for r = most + rest."""
    quadrant = (word + 0x20000000) >> 30
    turn = (word - (quadrant << 30)).to(tl.int32, bitcast=True)  # within an eighth of a circle of the quadrant's axis
    high = turn.to(tl.float32)
    low = (turn - high.to(tl.int32)).to(tl.float32)
    x = high * 1.462918119976564e-09
    y = x * x
    x_rest = tl.fma(high, -4.070940267922164e-17, tl.fma(high, 1.462918119976564e-09, -x))
    x_rest = tl.fma(low, 1.462918119976564e-09, x_rest)
    # The cosine is c + c_rest, the sine x + s_rest.
    c = tl.fma(y, -0.5, 1.0)
    c_rest = tl.fma(tl.fma(y, 2.4438417312921956e-05, -0.001388736767694354), y, 0.04166664555668831)
    c_rest = tl.fma(c_rest, y * y, tl.fma(-x, x_rest, tl.fma(y, -0.5, 1.0 - c)))
    s_rest = tl.fma(y, 2.718307996474323e-06, -0.0001983933470910415)
    s_rest = tl.fma(tl.fma(s_rest, y, 0.008333329111337662), y, -0.1666666716337204)
    s_rest = tl.fma(s_rest, x * y, x_rest * c)
    cosine = tl.fma(most, c, tl.fma(most, c_rest, rest * c)).to(tl.uint32, bitcast=True)
    sine = tl.fma(most, x, tl.fma(most, s_rest, rest * x)).to(tl.uint32, bitcast=True)
    odd = (quadrant & 1) != 0
    first = tl.where(odd, sine, cosine) ^ (((quadrant + 1) & 2) << 30)
    second = tl.where(odd, cosine, sine) ^ ((quadrant & 2) << 30)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def normals(w0, w1, w2, w3):
    """Four normals from four words."""
    most, rest = radius(w0)
    z0, z1 = rotate(most, rest, w1)
    most, rest = radius(w2)
    z2, z3 = rotate(most, rest, w3)
    return z0, z1, z2, z3


@triton.jit
def exponential_tail(f):
    """(exp(f) - 1 - f) / f^2 for |f| <= log(2) / 2."""
    p = tl.fma(f, 0.0013951719738543034, 0.008369598537683487)
    p = tl.fma(p, f, 0.0416661873459816)
    p = tl.fma(p, f, 0.16666512191295624)
    return tl.fma(p, f, 0.5)


@triton.jit
def exponential(x):
    """exp(x) to about one unit in the last place, 0 and infinity beyond the range of float32; NaN stays."""
    bounded = tl.where(x < -104.0, -104.0, x)
    bounded = tl.where(bounded > 89.0, 89.0, bounded)
    # Adding 1.5 * 2^23 rounds to a whole number.
    k = (bounded * 1.4426950216293335 + 12582912.0) - 12582912.0
    f = tl.fma(k, 1.9046542121259336e-09, tl.fma(k, -0.6931471824645996, bounded))
    e = 1.0 + tl.fma(f * f, exponential_tail(f), f)
    # 2^k in two factors, each of them a normal number.
    whole = tl.where(k == k, k, 0.0).to(tl.int32)
    half = whole >> 1
    return (
        e
        * ((half + 127) << 23).to(tl.float32, bitcast=True)
        * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    )


@triton.jit
def exponential_within(x):
    """exp of x held within -87 ... 87, where one factor is enough; NaN is for the caller to keep."""
    bounded = tl.minimum(tl.maximum(x, -87.0), 87.0)
    total = tl.fma(bounded, 1.4426950216293335, 12582912.0)
    k = total - 12582912.0
    f = tl.fma(k, 1.9046542121259336e-09, tl.fma(k, -0.6931471824645996, bounded))
    whole = total.to(tl.int32, bitcast=True) - 0x4B400000  # k, from the last bits of the sum
    return tl.fma(f, tl.fma(f, exponential_tail(f), 1.0), 1.0) * ((whole + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def silu(z):
    return z / (1.0 + exponential_within(-z))


@triton.jit
def silu_slope(z):
    s = 1.0 / (1.0 + exponential_within(-z))
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def growth(d):
    """exp(d) - 1, and exp(d) - 1 - d, without cancellation near 0."""
    p = tl.fma(d, 0.00019841270113829523, 0.0013888889225199819)
    p = tl.fma(p, d, 0.008333333767950535)
    p = tl.fma(p, d, 0.0416666679084301)
    p = tl.fma(p, d, 0.1666666716337204)
    p = tl.fma(p, d, 0.5)
    near, rest, whole = (d > -0.25) & (d < 0.25), d * d * p, exponential(d) - 1.0
    return tl.where(near, d + rest, whole), tl.where(near, rest, whole - d)


@triton.jit
def log_variance_of(v, lo, hi):
    """The log of a learned variance by the network's channel v, -1 ... 1 between lo and hi."""
    f = (1.0 + v) * 0.5
    return f * hi + (1.0 - f) * lo


@triton.jit
def divergence(v, lo, hi, b, miss):
    """The divergence of a step of learned variance whose estimate of x0 misses by ``miss``, and its slope in v."""
    log_variance = log_variance_of(v, lo, hi)
    d = lo - log_variance
    mean = b * miss
    excess = mean * mean * exponential(-log_variance)
    whole, rest = growth(d)
    return (rest + excess) * 0.5, (-whole - excess) * 0.5 * ((hi - lo) * 0.5)


@triton.jit
def clamp(x, bound):
    """x between -bound and bound; NaN stays."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))
