"""Forward passes of networks.py by hand, with drop(site, activations) at named sites."""

import torch.nn.functional as F


def plain(net, x, drop):
    x = drop("first.0", net.first[0](x))
    x = F.max_pool2d(net.second(net.first[2](net.first[1](x))), 2)
    x = drop("third", net.third(x))
    return net.linear(x.mean((2, 3)))


def pre_activation(net, x, drop):
    x, block = drop("layer_outputs.conv0", net.conv0(x)), net.block
    y = drop("block.conv1", block.conv1(F.relu(block.bn1(x))))
    y = drop("block.bn2", block.bn2(y))
    x = x + block.conv2(F.relu(y))
    return net.fc(F.relu(net.norm(x)).mean((2, 3)))


def mixed(net, x, drop):
    x = drop("depthwise", net.depthwise(net.stem(x)))
    x = net.pointwise(x)
    y = drop("norm", net.norm(x.permute(0, 2, 3, 1)))
    y = net.narrow(F.gelu(drop("wide", net.wide(y)))).permute(0, 3, 1, 2)
    return net.fc((x + y).mean((2, 3)))


def mlp(net, x, drop):
    x = drop("3", net[3](net[2](net[1](net[0](x)))))
    return net[6](drop("5", net[5](net[4](x))))
