"""What happens between two steps: texts that act on a world `w` (see kit.py), alike in plain torch and under mpcompile."""

from __future__ import annotations

from fuzz.parts import Part, needs

_DROP_GRAD = "for p in w.params(): p.grad = None"

EVENTS = (
    # 1. identity: parameters, layers, buffers, modules
    Part("replace parameter", run="l = linear(w, 0)\nl.weight = nn.Parameter(torch.randn_like(l.weight) * 0.3)"),
    Part("replace parameter and tell", run="l = linear(w, 0)\nold = l.weight\nl.weight = nn.Parameter(old.detach() * 0.5)\ntell(w, [l.weight], [old])"),
    Part("replace in its group", run="l = linear(w, 0)\nold = l.weight\nl.weight = nn.Parameter(old.detach() * 0.5)\n"
         "for g in w.o.param_groups: g['params'] = [l.weight if p is old else p for p in g['params']]\nw.o.state.pop(old, None)"),
    Part("replace layer", run="l = linear(w, 1)\nn = nn.Linear(l.in_features, l.out_features, l.bias is not None)\nswap(w, l, n)"),
    Part("replace layer and tell", run="l = linear(w, 1)\nn = nn.Linear(l.in_features, l.out_features, l.bias is not None)\n"
         "tell(w, n.parameters(), [p for p in l.parameters()])\nswap(w, l, n)"),
    Part("wrap layer", run="l = linear(w, 0)\nswap(w, l, nn.Sequential(l, nn.Tanh()))"),
    Part("replace activation", run="for m in list(w.m.modules()):\n if isinstance(m, nn.ReLU): swap(w, m, nn.Tanh())"),
    Part("replace buffer", run="for n, b in list(w.m.named_buffers()):\n if b.is_floating_point() and '.' not in n: setattr(w.m, n, b * 0.5)"),
    Part("drop bias", run="l = linear(w, 0)\nl.bias = None"),
    Part("load assigned", run="w.m.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in w.m.state_dict().items()}, assign=True)"),
    Part("load copied", run="w.m.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in w.m.state_dict().items()})"),
    Part("memory format", run="for m in w.m.modules():\n if isinstance(m, nn.Conv2d): m.to(memory_format=torch.channels_last)"),
    Part("transpose layout", run="l = linear(w, 0)\nl.weight.data = l.weight.data.t().contiguous().t()",
         needs=needs("layout")),
    Part("to same device", run="w.m.to('cpu')"),
    Part("double and back", run="w.m.double()\nw.m.float()", needs=needs("window")),
    Part("prune", run="l = linear(w, 0)\nif not prune.is_pruned(l): prune.l1_unstructured(l, 'weight', 0.5)"),
    Part("weight norm", run="l = linear(w, 0)\nif not parametrize.is_parametrized(l): parametrizations.weight_norm(l)"),
    Part("forward hook", run="linear(w, 0).register_forward_hook(lambda m, i, out: out * 0.5)"),
    Part("forward pre-hook", run="linear(w, 0).register_forward_pre_hook(lambda m, i: (i[0] * 0.5,))"),
    Part("backward hook", run="linear(w, 1).register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5 if gi[0] is not None else None,))"),
    Part("gradient hook", run="p = linear(w, 0).weight\nif p.requires_grad: p.register_hook(lambda g: g * 0.5)"),
    Part("accumulated hook", run="p = linear(w, 0).weight\nif p.requires_grad: p.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(0.5)] and None)"),
    Part("freeze", run="linear(w, 0).requires_grad_(False)", needs=needs("window")),
    Part("unfreeze", run="w.m.requires_grad_(True)", needs=needs("window")),
    Part("add parameter", run="l = linear(w, 0)\nn = nn.Sequential(l, nn.Linear(l.out_features, l.out_features))\nswap(w, l, n)\ntell(w, n[1].parameters())"),
    Part("attribute", run="for m in w.m.modules():\n if isinstance(m, nn.Dropout): m.p = 0.0\n if isinstance(m, nn.LayerNorm): m.eps = 0.1"),
    # what is called by a name, and tensors that no table of a module has
    Part("function replaced by name", run="names(of_module=torch.sin, of_class=torch.cos)"),
    Part("function of a class replaced", run="names(of_class=lambda z: 0.5 * z)"),
    Part("held function replaced", run="for n, v in list(vars(w.m).items()):\n if n.startswith('f') and callable(v): setattr(w.m, n, torch.sin)\n"
         " if n.startswith('f') and isinstance(v, list): v[0] = torch.sin"),
    Part("forward replaced", run="l = linear(w, 0)\nl.forward = lambda z: 0.5 * F.linear(z, l.weight, l.bias)"),
    Part("forward of a class replaced", run="l = linear(w, 0)\nclass Other(nn.Linear):\n"
         " def forward(self, z): return torch.sin(F.linear(z, self.weight, self.bias))\nl.__class__ = Other"),
    Part("plain tensor replaced", run="for n, v in list(vars(w.m).items()):\n if isinstance(v, torch.Tensor): setattr(w.m, n, v * 0.5)\n"
         " if n.startswith('t') and isinstance(v, list): v[0] = v[0] * 0.5"),
    Part("plain tensor edited", run="for n, v in list(vars(w.m).items()):\n if isinstance(v, torch.Tensor): v.mul_(0.5)\n"
         " if n.startswith('t') and isinstance(v, list): v[1]['a'].add_(0.3)"),
    Part("plain tensor edited through data", run="for n, v in list(vars(w.m).items()):\n if isinstance(v, torch.Tensor): v.data[1] = 3.0"),
    Part("layer leaves", run="l = linear(w, 0)\nif l.in_features == l.out_features: swap(w, l, nn.Identity())"),
    Part("parameter leaves", run="l = linear(w, 0)\nl.weight = nn.Parameter(l.weight.detach().clone(), requires_grad=False)"),
    Part("parameter becomes a buffer", run="l = linear(w, 0)\nif l.bias is not None and not parametrize.is_parametrized(l):\n"
         " b = l.bias.detach().clone()\n del l.bias\n l.register_buffer('bias', b)"),
    # the optimizer
    Part("swap groups", run="gs = w.o.param_groups\nif len(gs) > 1: gs[0]['params'][0], gs[1]['params'][0] = gs[1]['params'][0], gs[0]['params'][0]"),
    Part("leave group", run="g = w.o.param_groups[0]\nif len(g['params']) > 2: w.o.state.pop(g['params'].pop(0), None)"),
    Part("state cleared", run="w.o.state.clear()"),
    Part("one state emptied", run="for p in list(w.o.state)[:1]: w.o.state.pop(p)"),
    Part("moments replaced", run="for s in w.o.state.values():\n for k in s:\n  if k in ('exp_avg', 'momentum_buffer') and s[k] is not None: s[k] = torch.zeros_like(s[k])"),
    Part("moments edited", run="for s in w.o.state.values():\n for k in s:\n  if k in ('exp_avg', 'exp_avg_sq', 'momentum_buffer', 'sum') and s[k] is not None: s[k].mul_(0.5)"),
    Part("steps edited", run="for s in w.o.state.values():\n if isinstance(s.get('step'), torch.Tensor): s['step'].fill_(7)"),
    Part("optimizer loaded", run="w.o.load_state_dict(copy.deepcopy(w.o.state_dict()))"),
    Part("maximize", run="for g in w.o.param_groups:\n if 'maximize' in g: g['maximize'] = not g['maximize']"),
    Part("nesterov", run="for g in w.o.param_groups:\n if g.get('momentum') and not g.get('dampening', 1): g['nesterov'] = not g['nesterov']"),
    Part("learning rate", run="for g in w.o.param_groups: g['lr'] = g['lr'] * 0.5"),
    Part("weight decay", run="for g in w.o.param_groups:\n if 'weight_decay' in g: g['weight_decay'] = 0.1"),
    Part("betas", run="for g in w.o.param_groups:\n if 'betas' in g: g['betas'] = (0.7, 0.8)\n elif g.get('momentum'): g['momentum'] = 0.5"),
    Part("optimizer post-hook", run="w.o.register_step_post_hook(lambda o, a, k: [g.update(lr=g['lr'] * 0.9) for g in o.param_groups] and None)"),
    Part("optimizer pre-hook", run="w.o.register_step_pre_hook(lambda o, a, k: [g.update(lr=g['lr'] * 0.9) for g in o.param_groups] and None)",
         needs=needs("skip")),
    Part("hook that reads gradients", run="w.o.register_step_pre_hook(lambda o, a, k: [p.grad.mul_(0.5) for g in o.param_groups for p in g['params'] if p.grad is not None] and None)",
         needs=needs("skip")),
    Part("hook that reads parameters", run="def clamp(o, a, k):\n with torch.no_grad():\n  for g in o.param_groups:\n   for p in g['params']: p.clamp_(-0.4, 0.4)\n"
         "w.o.register_step_post_hook(clamp)"),
    Part("foreign step", run="w.foreign()", needs=needs("window")),
    Part("second step", run="w.s = w.new_step() if w.how == 'step' else None", needs=needs("window")),
    # edits
    Part("edit a row", run="linear(w, 0).weight.data[1] = 0.25"),
    Part("edit one number", run="linear(w, 0).weight.data[0, 3] = 1.0"),
    Part("edit scaled", run="for p in w.m.parameters(): p.data.mul_(0.9)"),
    Part("edit under no_grad", run="with torch.no_grad(): linear(w, 0).weight.mul_(0.9)"),
    Part("data replaced", run="l = linear(w, 0)\nl.weight.data = l.weight.data * 0.9"),
    Part("vector to parameters", run="v = nn.utils.parameters_to_vector(w.m.parameters())\nnn.utils.vector_to_parameters(v.detach() * 0.9, w.m.parameters())"),
    Part("averaged in", run="w.kept.setdefault('ema', [p.detach().clone() for p in w.m.parameters()])\n"
         "if len(w.kept['ema']) == len(list(w.m.parameters())):\n with torch.no_grad():\n  for p, e in zip(w.m.parameters(), w.kept['ema']):\n"
         "   if p.shape == e.shape: p.copy_(0.5 * p + 0.5 * e)"),
    # steps that go wrong
    Part("skip", run="w.micro(*batch(300, SIZES[0], poison=True), 0.5)", needs=needs("skip", "stats", "window")),
    Part("raise in the loss", run="x, y, f = batch(301, SIZES[0])\ntry: w.micro(x, y[:, :-1] + 100, f, 0.5)\n"
         "except Exception as error:\n if isinstance(error, MPCompileError): raise\n w.open = 0\nelse: w.note('nothing raised', 1)",
         needs=needs("window", "stats")),
    Part("interrupt", run="def stop(o, a, k): raise KeyboardInterrupt\nh = w.o.register_step_pre_hook(stop)\n"
         "try: w.micro(*batch(302, SIZES[0]), 0.5)\nexcept KeyboardInterrupt: w.open = 0\nh.remove()", needs=needs("window", "stats")),
    Part("resume", run="kept = copy.deepcopy((w.m.state_dict(), w.o.state_dict(), w.sched.state_dict() if w.sched else None, w.s.state_dict() if w.s else None))\n"
         "torch.manual_seed(SEED)\nw.take(Model())\nw.m.load_state_dict(kept[0])\nw.o.load_state_dict(kept[1])\n"
         "if w.sched: w.sched.load_state_dict(kept[2])\nif w.s: w.s.load_state_dict(kept[3])", needs=needs("structure", "window")),
    Part("deep copy", run="m = copy.deepcopy(w.m)\nw.take(m)", needs=needs("window")),
    Part("copy of the step", run="w.copied(copy.deepcopy)"),
    Part("pickle of the step", run="w.copied(lambda things: pickle.loads(pickle.dumps(things)))"),
    Part("through a file", run="w.through_a_file()", needs=needs("structure", "generator")),
    Part("step state alone", run="if w.s: w.s.load_state_dict(copy.deepcopy(w.s.state_dict()))"),
    # evaluation
    Part("evaluate", run="w.m.eval()\nwith torch.no_grad(): w.note('evaluated', w.loss(*batch(303, SIZES[0]), 0.5))\nw.m.train()", needs=needs("inside")),
    Part("infer", run="w.m.eval()\nwith torch.inference_mode(): w.note('inferred', w.loss(*batch(304, SIZES[0]), 0.5).clone())\nw.m.train()", needs=needs("inside")),
    Part("infer in training mode", run="with torch.inference_mode(): w.loss(*batch(305, SIZES[0]), 0.5)", needs=needs("stats")),
    Part("generate", run="w.m.eval()\nwith torch.no_grad():\n for n in (2, 3, 4): w.note(f'generated {n}', w.loss(*batch(306, (2, n)), 0.5))\nw.m.train()", needs=needs("inside")),
    Part("eval mode", run="w.m.eval()"),
    Part("train mode", run="w.m.train()"),
    Part("step under no_grad", run="if w.how == 'step':\n with torch.no_grad(): w.micro(*batch(307, SIZES[0]), 0.5)\nelse: w.micro(*batch(307, SIZES[0]), 0.5)"),
    Part("step under inference_mode", run="if w.how == 'step':\n with torch.inference_mode(): w.micro(*batch(308, SIZES[0]), 0.5)\nelse: w.micro(*batch(308, SIZES[0]), 0.5)"),
    Part("step under autocast", run="if w.how == 'step':\n with torch.autocast('cpu', torch.bfloat16): w.micro(*batch(309, SIZES[0]), 0.5)\nelse: w.micro(*batch(309, SIZES[0]), 0.5)"),
    Part("another size", run="w.micro(*batch(310, (3, 7)), 0.5)"),
    Part("one row", run="w.micro(*batch(311, (1, 4)), 0.5)"),
    Part("batch not contiguous", run="x, y, f = batch(312, (5, 4))\nw.micro(x.t(), y.t(), f.transpose(0, 1), 0.5)"),
    Part("zero and minus zero", run="w.micro(*batch(313, SIZES[0]), 0.0)\nw.micro(*batch(313, SIZES[0]), -0.0)"),
    Part("labels edited in place", run="x, y, f = batch(314, SIZES[0])\nw.micro(x, y, f, 0.5)\ny.copy_(y.flip(0))\nw.micro(x, y, f, 0.5)"),
    Part("count FLOPs", run="from torch.utils.flop_counter import FlopCounterMode\nwith FlopCounterMode(display=False): w.micro(*batch(315, SIZES[0]), 0.5)"),
    Part("dispatch mode", run="with Passing(): w.micro(*batch(316, SIZES[0]), 0.5)"),
    Part("function mode", run="with PassingFunctions(): w.micro(*batch(317, SIZES[0]), 0.5)"),
    Part("dispatch mode in evaluation", run="w.m.eval()\nwith torch.no_grad(), Passing(): w.note('moded', w.loss(*batch(318, SIZES[0]), 0.5))\nw.m.train()", needs=needs("inside")),
    Part("anomalies looked for", run="with torch.autograd.detect_anomaly(check_nan=False): w.micro(*batch(319, SIZES[0]), 0.5)"),
    Part("default device", run="with torch.device('cpu'): w.micro(*batch(320, SIZES[0]), 0.5)"),
    Part("saved tensors hooks", run="with torch.autograd.graph.saved_tensors_hooks(lambda z: z.clone(), lambda z: z): w.micro(*batch(321, SIZES[0]), 0.5)"),
    Part("clip kept", run="for p in w.params(): p.grad = None", needs=needs("window")),
)  # fmt: skip

# Changes of what the model is made of: a fresh model could not take its state dict.
STRUCTURE = frozenset({"replace layer", "wrap layer", "drop bias", "prune", "weight norm", "add parameter", "replace layer and tell",
                       "replace parameter", "replace parameter and tell", "replace in its group", "swap groups", "leave group", "freeze",
                       "unfreeze", "load assigned", "replace activation", "forward hook", "forward pre-hook", "backward hook",
                       "gradient hook", "accumulated hook", "optimizer post-hook", "optimizer pre-hook", "attribute", "replace buffer",
                       "held function replaced", "forward replaced", "forward of a class replaced", "plain tensor replaced",
                       "plain tensor edited", "plain tensor edited through data", "layer leaves", "parameter leaves",
                       "parameter becomes a buffer", "hook that reads gradients", "hook that reads parameters"})  # fmt: skip
