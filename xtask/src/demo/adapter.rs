//! A random LoRA adapter, the same in every run.

use super::Error;
use candle_core::{Device, Tensor};
use candle_lazy::nn::models::CausalLm;
use candle_lazy::nn::LoraWeights;

const RANK: usize = 8;
const SCALE: f64 = 2.0;

/// Puts an adapter with B ≠ 0 on the q and v projection of every block; returns what was done, in words.
pub(super) fn attach(model: &mut CausalLm) -> Result<String, Error> {
    let config = model.config().clone();
    let device = model.device().clone();
    let mut random = Random(20);
    let widths = [
        ("q_proj", config.num_attention_heads * config.head_dim),
        ("v_proj", config.num_key_value_heads * config.head_dim),
    ];
    for block in 0..config.num_hidden_layers {
        for (name, width) in widths {
            // large enough to move what the model says, small enough that it still speaks
            let a = random.tensor((config.hidden_size, RANK), 1. / (config.hidden_size as f32).sqrt(), &device)?;
            let b = random.tensor((RANK, width), 0.25, &device)?;
            let (a, b) = (a.to_dtype(model.dtype())?, b.to_dtype(model.dtype())?);
            let weights = LoraWeights::new(a, b, SCALE)?;
            model.set_lora(&format!("model.layers.{block}.self_attn.{name}"), Some(weights))?;
        }
    }
    Ok(format!("a random LoRA adapter of rank {RANK} on q and v of {} blocks", config.num_hidden_layers))
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in −bound..bound.
    fn tensor(&mut self, (rows, columns): (usize, usize), bound: f32, device: &Device) -> Result<Tensor, Error> {
        let mut values = Vec::with_capacity(rows * columns);
        for _ in 0..rows * columns {
            // the top 24 bits are a float's whole precision
            let unit = (self.next() >> 40) as f32 / (1u32 << 24) as f32;
            values.push((2. * unit - 1.) * bound);
        }
        Ok(Tensor::from_vec(values, (rows, columns), device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_numbers_every_time_and_within_the_bound() {
        let draw =
            || Random(20).tensor((16, 4), 0.5, &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let values = draw();
        assert_eq!(values, draw());
        assert!(values.iter().all(|v| v.abs() <= 0.5));
        assert!(values.iter().any(|v| *v > 0.1) && values.iter().any(|v| *v < -0.1));
    }

    #[test]
    fn splitmix_gives_its_published_numbers() {
        // the first outputs for the seed 1234567, as in the reference test of the Java and C versions
        let mut random = Random(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }
}
