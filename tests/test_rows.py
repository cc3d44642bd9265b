"""Rows of METHODS against the papers' constants, typed out; names of rows with +KEY=VALUE."""
import importlib
import os
import re

import pytest
import torch

import common
from conftest import says

SCRIPTS = {key: importlib.import_module(key) for key in "cifar mnist celeba imagenet ring2d ring3d".split()}

# name, networks, loss, kernel, outputs and steps of the critic, optimizer, rate, betas, - for what a row has
# no use for; what is not named is off or in OTHERS; sigma=gamn: .05,.1,.2,.5,1,2; as-cifar: rows that are
# cifar's but for these networks
ROWS = """
# cifar
gram          gram    gram        li       128 0 adam    4e-4 .5,.999 form=swap ridge=1
gram-flow     gram    gram        li       128 0 adam    4e-4 .5,.999 form=flow ridge=1e-2
gram-eq9      gram    gram        li       128 0 adam    5e-5 .5,.999 form=sum ridge=1e-3
gram-clip     gram    gram        li       128 0 adam    5e-5 .5,.999 form=clip ridge=1e-3
gan           gram    gan         -        1   1 adam    2e-4 .5,.999 lr_g=4e-4
mmdnet        gram    mmd         li       0   0 adam    1e-3 .5,.999
mmdgan        gram    mmd         li       128 5 rmsprop 5e-5 -       autoencoder=8 feasible=16 clip=1 burst=1
mmdgan-noae   gram    mmd         li       128 5 rmsprop 5e-5 -       feasible=16 clip=1 burst=1
mmdgan-nofsr  gram    mmd         li       128 5 rmsprop 5e-5 -       autoencoder=8 clip=1 burst=1
mmdgan-plain  gram    mmd         li       128 5 rmsprop 5e-5 -       clip=1 burst=1
mmdgan-conv   li      mmd         li       128 5 rmsprop 5e-5 -       autoencoder=8 feasible=16 clip=1 burst=1
mmd-rqdot     dcgan   mmd2        rqdot    16  5 adam    1e-4 .5,.9   penalty=1 activation=1 decay=.5
mmd-rq        dcgan   mmd2        rq       16  5 adam    1e-4 .5,.9   penalty=1 decay=.5
mmd-rbf       dcgan   mmd2        rbf      16  5 adam    1e-4 .5,.9   penalty=1 decay=.5
mmd-dot       dcgan   mmd2        dot      16  5 adam    1e-4 .5,.9   penalty=1 decay=.5
mmd-dist      dcgan   mmd2        distance 256 5 adam    1e-4 .5,.9   penalty=10 activation=1e-4 decay=.5
cramer        dcgan   cramer      distance 256 5 adam    1e-4 .5,.9   penalty=10 decay=.5
wgan-gp       dcgan   wasserstein -        1   5 adam    1e-4 .5,.9   penalty=10 decay=.5
gamn          gamn    mmd         gmmn     10  5 adam    1e-4 .5,.9   penalty=10
gamn-mmd      gamn    mmd         gmmn     10  5 adam    1e-4 .5,.9   penalty=10 data_mmd=1
gamn-l1       gamn    mmd         gmmn     10  5 adam    1e-4 .5,.9   penalty=1e-3 weights=l1
gamn-l2       gamn    mmd         gmmn     10  5 adam    1e-4 .5,.9   penalty=1e-3 weights=l2
gamn-l2-all   gamn    mmd         gmmn     10  5 adam    1e-4 .5,.9   penalty=1e-3 weights=l2-all
gamn-wgan-gp  wgan-gp wasserstein -        1   5 adam    1e-4 .5,.9   penalty=10
gmmn          gmmn    mmd         gmmn     0   0 adam    1e-3 .5,.999 batch=1000
gmmn-ae       gmmn-ae mmd         unit     0   0 adam    1e-3 .5,.999 batch=1000
wgan          wgan    wasserstein -        1   5 rmsprop 5e-5 -       clip=1
smmd          sngan   smmd        unit     1   5 adam    1e-4 .5,.9   scale=10 decay=.8
sn-smmd       sngan   smmd        unit     1   5 adam    1e-4 .5,.9   spectral=learned scale=10 decay=.8
swgan         sngan   swgan       -        1   5 adam    1e-4 .5,.9   scale=10 decay=.8
sn-swgan      sngan   swgan       -        1   5 adam    1e-4 .5,.9   spectral=learned scale=10 decay=.8
sn-gan        sngan   gan         -        1   5 adam    1e-4 .5,.9   spectral=fixed decay=.8
sobolev       sngan   sobolev     -        1   5 adam    1e-4 .5,.9   rho=1e-6 decay=.8
sngan-wgan-gp sngan   wasserstein -        1   5 adam    1e-4 .5,.9   penalty=10 decay=.8
mmd-gp-l2     sngan   mmd2        unit     1   5 adam    1e-4 .5,.9   penalty=1 activation=1 decay=.8
mmd-plain     sngan   mmd2        unit     1   5 adam    1e-4 .5,.9   decay=.8
sn-mmd        sngan   mmd2        unit     1   5 adam    1e-4 .5,.9   spectral=fixed decay=.8
sn-wgan       sngan   wasserstein -        1   5 adam    1e-4 .5,.9   spectral=fixed decay=.8
sn-mmd-gp     sngan   mmd2        unit     1   5 adam    1e-4 .5,.9   penalty=1 spectral=learned decay=.8
sn-wgan-gp    sngan   wasserstein -        1   5 adam    1e-4 .5,.9   penalty=10 spectral=learned decay=.8
sn-mmd-gp-l2  sngan   mmd2        unit 1 5 adam 1e-4 .5,.9 penalty=1 activation=1 decay=.8 spectral=learned
sn-mmd-l2     sngan   mmd2        unit     1   5 adam    1e-4 .5,.9   activation=1 spectral=fixed decay=.8
# mnist
as-cifar mmd-rqdot=dcgan16 mmd-rbf=dcgan16 mmd-dot=dcgan16 mmd-dist=dcgan16 cramer=dcgan16 gmmn=gmmn
as-cifar gmmn-ae=gmmn-ae smmd=dcgan sn-smmd=dcgan
gram      gram    gram        li       100 0 adam    1e-3 .5,.999 form=sum ridge=1e-3 batch=200
gram-clip gram    gram        li       100 0 adam    1e-3 .5,.999 form=clip ridge=1e-3 batch=200
gram-swap gram    gram        li       100 0 adam    1e-3 .5,.999 form=swap ridge=1 batch=200
wgan-gp+nets=dcgan16+decay=.5+batch=64 dcgan16 wasserstein - 1 5 adam 1e-4 .5,.9 penalty=10 decay=.5
gamn      gamn    mmd         gmmn     10  5 adam    1e-4 .5,.9   penalty=10 batch=50
wgan      wgan    wasserstein -        1   5 rmsprop 5e-5 -       clip=1 batch=50
wgan-gp   wgan-gp wasserstein -        1   5 adam    1e-4 .5,.9   penalty=10 batch=50
gan       wgan    gan         -        1   1 adam    2e-4 .5,.999 batch=50
gcmmd     dcgan   gcmmd       -        1   5 adam    1e-4 .5,.9   lam=1 decay=.8
sn-gcmmd  dcgan   gcmmd       -        1   5 adam    1e-4 .5,.9   spectral=learned lam=1 decay=.8
# celeba160
as-cifar mmd-rqdot=resnet cramer=resnet wgan-gp=resnet sn-smmd=scaled swgan=scaled sn-swgan=scaled
as-cifar sn-gan=scaled sobolev=scaled
smmd         scaled  smmd        unit     1   5 adam    1e-4 .5,.9   scale=.1 decay=.8
# celeba64
as-cifar gram=gram gan=gram mmdgan=gram
mmdgan-conv  li      mmd         li       64  5 rmsprop 5e-5 -       autoencoder=8 feasible=16 clip=1 burst=1
# lsun
as-cifar mmd-rqdot=dcgan mmd-dist=dcgan cramer=dcgan wgan-gp=dcgan gamn=gamn gamn-wgan-gp=wgan-gp wgan=wgan
# imagenet
sn-smmd scaled smmd unit 1   5 adam 2e-4 .5,.9   spectral=learned scale=10 decay=.8
smmd    scaled smmd unit 1   5 adam 2e-4 .5,.9   scale=10 decay=.8
sn-gan  scaled gan  -    1   5 adam 2e-4 .5,.9   spectral=fixed decay=.8
gram    scaled gram li   128 0 adam 2e-4 .5,.999 form=swap ridge=1
# ring2d
gram        - gram        - 2  0 adam    1e-3 .5,.999 form=sum ridge=1e-3
gram-mean   - gram        - 2  0 adam    1e-3 .5,.999 form=mean ridge=1e-3
gram-clip   - gram        - 2  0 adam    1e-3 .5,.999 form=clip ridge=1e-3
gram-swap   - gram        - 2  0 adam    1e-3 .5,.999 form=swap ridge=1e-3
gram-flow   - gram        - 2  0 adam    1e-3 .5,.999 form=flow ridge=1e-3
gan         - gan         - 1  1 adam    1e-4 .5,.999
mmdnet      - mmd         - 0  0 rmsprop 1e-3 -
mmdgan      - mmd         - 2  5 adam    5e-5 .5,.999 autoencoder=8 feasible=16 clip=.1
wgan        - wasserstein - 1  5 rmsprop 5e-5 -       clip=1e-2 batch=256
wgan-gp     - wasserstein - 1  5 adam    1e-4 .5,.9   penalty=.1 batch=256
gmmn        - mmd         - 0  0 adam    1e-4 .5,.9   batch=256 sigma=gamn
gamn        - mmd         - 10 5 adam    1e-4 .5,.9   penalty=10 batch=256 sigma=gamn norms=1
gamn-mmd    - mmd         - 10 5 adam    1e-4 .5,.9   penalty=10 data_mmd=1 batch=256 sigma=gamn norms=1
gamn-l1     - mmd         - 10 5 adam    1e-4 .5,.9   penalty=1e-3 weights=l1 batch=256 sigma=gamn norms=1
gamn-l2     - mmd         - 10 5 adam    1e-4 .5,.9   penalty=1e-3 weights=l2 batch=256 sigma=gamn norms=1
gamn-l2-all - mmd         - 10 5 adam    1e-4 .5,.9   penalty=1e-3 weights=l2-all batch=256 sigma=gamn norms=1
# ring3d
gram   - gram   - - - adam    1e-3 .5,.999 form=sum
gan    - gan    - - - adam    1e-4 .5,.999
mmdnet - mmdnet - - - rmsprop 1e-3 -
mmdgan - mmdgan - - - adam    5e-5 .5,.999
"""
OTHERS = dict(batch="64", slope="image", average="3", contrast="1", mirror="1", precision="tf32", sigma="1")
USED = dict(form=["gram"], ridge=["gram"], scale=["smmd", "swgan"], rho=["sobolev"], lam=["gcmmd"])
SHARED = dict(LAMBDA=1, ADAPT=(10, 3, 0.1, 1e-6), CODES=2_048, BURST=100, BURST_UNTIL=25, BURST_EVERY=500,
              RBF=(2, 5, 10, 20, 40, 80), ALPHA=(0.2, 0.5, 1, 2, 5), RESAMPLINGS=10, MODES=8, RADIUS=2, Z=20,
              HIDDEN=(100, 100), WIDTHS=(20, 100, 200), NOISES=(2, 4, 8, 16))
OWN = {"cifar": dict(SIGMA=(1, 2, 4, 8, 16), ADAPT_EVERY=2_000, BOOTSTRAP=25_000, ENCODE=20_000, CLIP=0.01),
       "mnist": dict(SIGMA=(0.1, 1, 10, 100), ADAPT_EVERY=500, BOOTSTRAP=100_000, ENCODE=10_000, CLIP=0.01),
       "lsun": dict(SIGMA=(1, 2, 4, 8, 16), ADAPT_EVERY=2_000, BOOTSTRAP=25_000, STEPS=150_000, CLIP=0.01),
       "imagenet": dict(SIGMA=(1, 2, 4, 8, 16), ADAPT_EVERY=2_000, BOOTSTRAP=50_000, STEPS=150_000),
       "ring3d": dict(SIGMA=(1,), CLIP=0.1, STD=0.2, STD_3=0.1, DEGREES=60, RIDGE=1e-3, FEASIBLE=16,
                      AUTOENCODER=8, CRITIC_STEPS=5, K=2)}


def typed(text):
    """A number or numbers by commas, or the text."""
    try:
        values = tuple(map(float, text.split(",")))
        return values if len(values) > 1 else values[0]
    except ValueError:
        return text


def rows_of(title):
    """The columns of a section's rows by their names."""
    [lines] = [lines for own, *lines in map(str.splitlines, ROWS.split("# ")) if own == title]
    rows = {name: columns for name, *columns in map(str.split, lines)}
    for pair in " ".join(line[9:] for line in lines if line.startswith("as-cifar")).split():
        name, nets = pair.split("=")
        rows[name] = [nets, *rows_of("cifar")[name][1:]]
    rows.pop("as-cifar", None)
    return rows


@pytest.mark.parametrize("title", re.findall("# (.*)", ROWS))
def test_constants_of_the_papers(title):
    script = SCRIPTS.get(title, SCRIPTS["celeba"])             # with a table for each of its sets
    methods = script.METHODS if title in SCRIPTS else script.METHODS[title]
    others = OTHERS | (dict(batch="200", std=".2") if "ring" in title else {})
    rows = rows_of(title)
    assert {name for name in rows if "+" not in name} == methods.keys()
    for name, columns in rows.items():
        name, row = common.find_row(name, methods, script.DEFAULTS, script.NAMES)
        wanted = others | dict(zip("nets loss kernel critic critic_steps opt lr beta".split(), columns))
        wanted |= dict(pair.replace("=gamn", "=.05,.1,.2,.5,1,2").split("=") for pair in columns[8:])
        for key, value in row.items():
            value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            if wanted.get(key) != "-" and row["loss"] in USED.get(key, [row["loss"]]):
                assert (value or 0) == typed(wanted.get(key, "0")), (name, key)
    for key, value in (SHARED | OWN.get(title, {})).items():
        assert getattr(script, key, None if key in OWN.get(title, {}) else value) == value, key


# ---- NAME+KEY=VALUE ---------------------------------------------------------------------------------------

def found(text):
    return SCRIPTS["cifar"].row_of(text)


def test_names_with_keys_are_canonical():
    """In DEFAULTS' order, without what changes nothing; each value has its key's type."""
    name, row = found("mmd-rqdot+mirror=0+nets=dcgan16+beta=0.5,0.9+batch=128+lr=2e-4+burst=1")
    assert name == "mmd-rqdot+nets=dcgan16+burst=1+lr=0.0002+batch=128+mirror=0"
    assert found(name) == (name, row) and found("mmd-rqdot+critic=16")[0] == "mmd-rqdot"
    base = found("mmd-rqdot")[1]
    assert row == base | dict(nets="dcgan16", burst=True, lr=2e-4, batch=128, mirror=False)
    assert [type(row[key]) for key in base] == [type(value) for value in base.values()]
    name, row = found("wgan-gp+beta=0,0.9+penalty=1+weights=")
    assert name == "wgan-gp+beta=0,0.9+penalty=1" and row["beta"] == (0.0, 0.9) and row["penalty"] == 1.0
    for text, *rates in (("gan", 2e-4, 4e-4), ("gan+lr=1e-3", 1e-3, 0), ("gan+lr=1e-3+lr_g=1", 1e-3, 1)):
        name, row = found(text)
        assert [row["lr"], row["lr_g"]] == rates and found(name) == (name, row)
    for text, name in (("mmdnet+lr=1.0000001e-03", "mmdnet+lr=0.0010000001"), 2 * ("gan+batch=1234567",)):
        assert found(text)[0] == name and found(name) == found(text)
    assert [found(name)[0] for name in SCRIPTS["cifar"].PAPER] == list(SCRIPTS["cifar"].PAPER)


def test_the_generator_in_results():
    cifar, path = SCRIPTS["cifar"], f"{os.path.dirname(common.__file__)}/results/gram-cifar10.pt"
    y = cifar.sample(*cifar.load_generator(path, torch.device("cpu")), 3)
    assert y.shape == (3, 3, 32, 32) and y.float().std() > 30


@pytest.mark.parametrize("text, parts", [
    ("gramm", ["'gramm'", "did you mean gram?", "mmdgan"]), ("gram+critics=8", ["'critics'", "mean critic?"]),
    ("gram+nets=weeak", ["'weeak'", "did you mean weak?", "dcgan16"]), ("gram+critic=1.5", ["'1.5'", "int"]),
    ("gram+mirror=yes", ["'yes' for mirror", "bool, as 1"]), ("gram+lr=fast", ["'fast' for lr", "as 0.0001"]),
    ("gan+beta=0.5;0.9", ["'0.5;0.9' for beta", "tuple, as 0.5,0.999"]), ("gram+", ["''", "ridge"]),
    ("+critic=8", ["''", "mmdgan"]), ("gram+critic", ["'' for critic", "int"]), ("zzz", ["expected gram"]),
    ("gram+lr=nan", ["'nan' for lr"]), ("gan+lr=1e400", ["'1e400'"]), ("gan+beta=0.5,1", ["'0.5,1'"])])
def test_rows_that_are_not_there(text, parts):
    with says(f"--method {text}", *parts):
        found(text)
