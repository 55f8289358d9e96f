//! Weights that depend on a seed and their name only: the eager and the ported model get the same.

use candle_core::{DType, Device, Result, Shape, Tensor};
use eager_nn::var_builder::SimpleBackend;
use eager_nn::Init;

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17).
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in −1..1.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Ids below `vocab`.
    pub fn ids(&mut self, (batch, len): (usize, usize), vocab: usize) -> Result<Tensor> {
        let ids: Vec<u32> = (0..batch * len).map(|_| (self.bits() % vocab as u64) as u32).collect();
        Tensor::from_vec(ids, (batch, len), &Device::Cpu)
    }
}

/// Makes every tensor that a model asks for.
#[derive(Clone)]
pub struct RandomWeights {
    pub seed: u64,
    /// Biases are zero otherwise.
    pub biases: bool,
    /// Names that are not there.
    pub absent: &'static [&'static str],
}

impl SimpleBackend for RandomWeights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut random = Random::new(hash ^ self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let fan_in = shape.dims().last().copied().unwrap_or(1).max(1) as f32;
        let (mean, scale) = match name {
            _ if name.ends_with("bias") => (0.0, if self.biases { 0.3 } else { 0.0 }),
            _ if shape.rank() == 1 => (1.0, 0.3),
            _ if name.contains("embed") => (0.0, 1.0),
            _ => (0.0, (3.0 / fan_in).sqrt()),
        };
        let values: Vec<f32> = (0..shape.elem_count()).map(|_| mean + scale * random.unit()).collect();
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name}: asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !self.absent.contains(&name)
    }
}

impl RandomWeights {
    pub fn eager(&self) -> eager_nn::VarBuilder<'static> {
        eager_nn::VarBuilder::from_backend(Box::new(self.clone()), DType::F32, Device::Cpu)
    }

    pub fn ported(&self) -> candle_lazy::candle_nn::VarBuilder<'static> {
        candle_lazy::candle_nn::VarBuilder::from_backend(Box::new(self.clone()), DType::F32, Device::Cpu)
    }
}
